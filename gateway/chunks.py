"""The chunks of chat and text completions, made from the events of a job's log."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

from ingine.contract.events import TerminalEvent, TokensEvent
from ingine.gateway import sse
from ingine.gateway.ids import position_id
from ingine.message import MessageDelta
from ingine.producer.choices import last_chunks
from ingine.producer.openai.responses import (
    chat_logprobs,
    completion_logprobs,
    prompt_logprobs_fields,
    usage_fields,
)
from ingine.producer.results import Chunk, raise_unless_finished


def with_alias(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message or delta that has its reasoning under both names that clients know."""
    if "reasoning" in message:
        return message | {"reasoning_content": message["reasoning"]}
    return message


class Chunks(ABC):
    """The chunks of one stream, as bytes. Which chunks an event becomes depends on the event alone, so that
    any gateway can go on with the stream after any log entry."""

    object_name: str

    def __init__(self, job_id: str, *, model: str, created: int, include_usage: bool):
        self._job_id = job_id
        self._include_usage = include_usage
        self._head = {"id": job_id, "object": self.object_name, "created": created, "model": model}
        self._is_parsed = False

    def of_tokens(self, event: TokensEvent) -> bytes:
        """Return the chunks of new tokens, the last of which has the event's position as id."""
        self._is_parsed = self._is_parsed or event.delta is not None
        is_first = (event.start if event.choice_position is None else _start_in_choice(event)) == 0
        choices = self._opening(event.index) if is_first else []
        chunk = Chunk(
            event.text,
            event.token_ids,
            event.position,
            event.logprobs,
            event.index,
            prompt_logprobs=event.prompt_logprobs,
            parsed=event.delta,
        )
        chunks = [self._chunk([choice]) for choice in (*choices, *self._choices(chunk))]
        if event.prompt_logprobs is not None:  # vLLM's
            chunks[-1]["prompt_logprobs"] = prompt_logprobs_fields(event.prompt_logprobs)
        return self._bytes(chunks, position_id(self._job_id, event.position))

    def of_end(self, end: TerminalEvent) -> bytes:
        """Return the last chunks: what was held back, each choice's finish_reason, and the usage if wanted.

        The choices end together, also where a choice has ended before: so a resumed stream has each end once.
        Raises JobFailed, JobCancelled or JobExpired unless the job has finished.
        """
        raise_unless_finished(end)
        chunks = []
        single = {"index": 0, "num_output_tokens": end.position, "finish_reason": end.finish_reason}
        ends = end.choices or [single | {"stop_reason": end.stop_reason}]
        held_back = {chunk.index: chunk for chunk in last_chunks(end, is_parsed=self._is_parsed)}
        for choice in ends:
            index = choice["index"]
            if choice["num_output_tokens"] == 0:
                chunks += [self._chunk([each]) for each in self._opening(index)]
            if index in held_back:
                chunks += [self._chunk([each]) for each in self._choices(held_back[index])]
            chunks.append(self._chunk([self._ending(choice)]))
        if self._include_usage:
            chunks.append(self._head | {"choices": [], "usage": usage_fields(end.usage)})
        return self._bytes(chunks, position_id(self._job_id, end.position, terminal=True))

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        usage = {"usage": None} if self._include_usage else {}
        return self._head | {"choices": choices} | usage

    def _bytes(self, chunks: list[dict[str, Any]], position: str) -> bytes:
        events = [sse.event(chunk) for chunk in chunks[:-1]]
        return b"".join([*events, *(sse.event(chunk, position=position) for chunk in chunks[-1:])])

    @abstractmethod
    def _opening(self, index: int) -> list[dict[str, Any]]:
        """Return what comes before a choice's first tokens."""

    @abstractmethod
    def _choices(self, chunk: Chunk) -> Iterator[dict[str, Any]]:
        """Yield what a part of a choice adds, if anything. One with log probabilities adds something."""

    @abstractmethod
    def _ending(self, choice: dict[str, Any]) -> dict[str, Any]:
        """Return the end of a choice, which has no text."""


class ChatChunks(Chunks):
    object_name = "chat.completion.chunk"

    def _opening(self, index: int) -> list[dict[str, Any]]:
        return [_chat_choice(index, {"role": "assistant", "content": ""})]

    def _choices(self, chunk: Chunk) -> Iterator[dict[str, Any]]:
        if chunk.delta or chunk.logprobs or chunk.prompt_logprobs:
            logprobs = chat_logprobs(chunk.logprobs) if chunk.logprobs else None
            yield _chat_choice(
                chunk.index, with_alias(MessageDelta.from_openai(chunk.delta).to_openai()), logprobs=logprobs
            )

    def _ending(self, choice: dict[str, Any]) -> dict[str, Any]:
        return _chat_choice(choice["index"], {}, finish_reason=choice["finish_reason"]) | _stop_reason(choice)


class TextChunks(Chunks):
    object_name = "text_completion"

    def __init__(self, job_id: str, *, prompt: str = "", **options: Any):
        """prompt: what each text begins with, see `requests.echoes`."""
        super().__init__(job_id, **options)
        self._prompt = prompt
        self._num_chars: dict[int, int] = {}

    def _opening(self, index: int) -> list[dict[str, Any]]:
        return [_text_choice(index, self._prompt)] if self._prompt else []

    def _choices(self, chunk: Chunk) -> Iterator[dict[str, Any]]:
        logprobs = None
        if chunk.logprobs:
            logprobs = completion_logprobs(chunk.logprobs)
            begins = self._num_chars.get(chunk.index, 0)
            self._num_chars[chunk.index] = begins + sum(map(len, logprobs["tokens"]))
            logprobs["text_offset"] = [begins + offset for offset in logprobs["text_offset"]]
        if chunk.text or logprobs or chunk.prompt_logprobs:
            yield _text_choice(chunk.index, chunk.text, logprobs=logprobs)

    def _ending(self, choice: dict[str, Any]) -> dict[str, Any]:
        ending = _text_choice(choice["index"], "", finish_reason=choice["finish_reason"])
        return ending | _stop_reason(choice)


def _start_in_choice(event: TokensEvent) -> int:
    assert event.choice_position is not None
    return event.choice_position - len(event.token_ids)


def _stop_reason(choice: dict[str, Any]) -> dict[str, Any]:
    """vLLM's field, where a stop string or token has ended the choice."""
    return {"stop_reason": choice["stop_reason"]} if choice.get("stop_reason") is not None else {}


def _chat_choice(
    index: int, delta: dict[str, Any], *, logprobs: Any = None, finish_reason: str | None = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


def _text_choice(
    index: int, text: str, *, logprobs: Any = None, finish_reason: str | None = None
) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}
