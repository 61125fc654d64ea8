"""The engine for offline use, with the face that vLLM's users know."""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from itertools import count
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ingine.config import EngineConfig
from ingine.engine import Engine
from ingine.errors import ConfigError, ErrorCode, InvalidRequest
from ingine.model_store import DEFAULT_MODEL
from ingine.outputs import CompletionOutput, RequestOutput, RequestTimings, SeqOutput
from ingine.sampling_params import SamplingParams
from ingine.tokenizer import required

__all__ = ["LLM", "CompletionOutput", "RequestOutput"]

Prompt = str | Mapping[str, Sequence[int]]
"""A text, or {"prompt_token_ids": [...]}."""
Message = Mapping[str, str]
"""{"role": ..., "content": ...}."""


class LLM:
    """Loads a model, and generates for all prompts of a call in one continuous batch.

    >>> from ingine import LLM, SamplingParams
    >>> llm = LLM()
    >>> llm.chat([{"role": "user", "content": "Hi!"}], SamplingParams(max_tokens=32))[0].outputs[0].text
    """

    def __init__(self, model: str = DEFAULT_MODEL, **options: Any):
        """`options` are the fields of `EngineConfig`. Raises ConfigError, also for one that is not known."""
        known = {field.name for field in fields(EngineConfig)}
        if unknown := sorted(options.keys() - known):
            raise ConfigError(f"unknown option {', '.join(unknown)}; there are {', '.join(sorted(known))}")
        config = EngineConfig(model, **options)
        if config.tensor_parallel_size > 1:
            raise ConfigError("tensor_parallel_size: only `ingine worker`, under torchrun, has several ranks")
        self.engine = Engine(config)
        self._request_ids = count()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = False,
    ) -> list[RequestOutput]:
        """One output a prompt, in the order of the prompts. Blocks until all are finished.

        A list of `sampling_params` has one for each prompt. Raises InvalidRequest before anything runs, if
        a prompt or parameter is wrong. Interrupted, it drops its requests, and the engine can be used on.
        """
        prompts = [prompts] if isinstance(prompts, (str, Mapping)) else _as_list(prompts, "prompts")
        return self._run([self._tokenize(prompt) for prompt in prompts], sampling_params, progress)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = False,
    ) -> list[RequestOutput]:
        """`generate` for a conversation, or a list of conversations, in the model's chat template."""
        conversations = _as_list(messages, "messages")
        if conversations and isinstance(conversations[0], Mapping):
            conversations = [conversations]
        tokenizer = required(self.engine.tokenizer)
        tokenized = [(None, tokenizer.encode_chat(_checked(messages))) for messages in conversations]
        return self._run(tokenized, sampling_params, progress)

    def _tokenize(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        if isinstance(prompt, str):
            return prompt, required(self.engine.tokenizer).encode(prompt)
        if isinstance(prompt, Mapping) and prompt.keys() == {"prompt_token_ids"}:
            return None, _as_list(prompt["prompt_token_ids"], "prompt_token_ids")
        raise InvalidRequest(
            ErrorCode.INVALID_TYPE, f'a prompt is a str or {{"prompt_token_ids": [...]}}, not {prompt!r:.100}'
        )

    def _run(
        self,
        prompts: list[tuple[str | None, list[int]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        progress: bool,
    ) -> list[RequestOutput]:
        params = _one_each(sampling_params, len(prompts))
        for (_, prompt_token_ids), each in zip(prompts, params, strict=True):
            self.engine.validate(prompt_token_ids, each)
        requests = [
            _new_output(str(next(self._request_ids)), prompt, prompt_token_ids)
            for prompt, prompt_token_ids in prompts
        ]
        try:
            for request, each in zip(requests, params, strict=True):
                self.engine.add(request.request_id, request.prompt_token_ids, each)
            self._finish({request.request_id: request for request in requests}, progress)
        except BaseException:  # Ctrl-C above all
            for request in requests:
                self.engine.abort(request.request_id)
            raise
        return requests

    def _finish(self, requests: dict[str, RequestOutput], progress: bool) -> None:
        columns = (TextColumn("{task.completed}/{task.total} prompts"), BarColumn(), TimeRemainingColumn())
        with Progress(*columns, disable=not progress) as bar:
            row = bar.add_task("", total=len(requests))
            num_finished = 0
            while num_finished < len(requests):
                for output in self.engine.step():
                    _update(requests[output.seq_id], output)
                    num_finished += output.finish_reason is not None
                bar.update(row, completed=num_finished)


def _new_output(request_id: str, prompt: str | None, prompt_token_ids: list[int]) -> RequestOutput:
    return RequestOutput(
        request_id=request_id,
        prompt=prompt,
        prompt_token_ids=prompt_token_ids,
        outputs=[CompletionOutput(0, "", [], None, None, None)],
        finished=False,
        num_cached_tokens=0,
        usage={},
        timings=RequestTimings(arrival_time=time.time()),
    )


def _update(request: RequestOutput, output: SeqOutput) -> None:
    """Add what a step made."""
    completion, timings = request.outputs[0], request.timings
    completion.text += output.text + output.final_text
    completion.token_ids += output.token_ids
    if output.logprobs:
        completion.logprobs = (completion.logprobs or []) + output.logprobs
    if output.token_ids and timings.first_token_time is None:
        timings.first_token_time = time.time()
    if output.finish_reason is None:
        return
    completion.finish_reason, completion.stop_reason = output.finish_reason, output.stop_reason
    request.finished = True
    request.num_cached_tokens = output.num_cached_tokens
    request.usage = {
        "num_prompt_tokens": output.num_prompt_tokens,
        "num_cached_tokens": output.num_cached_tokens,
        "num_output_tokens": output.position,
    }
    timings.finished_time = time.time()


def _as_list(value: Any, name: str) -> list:
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise InvalidRequest(ErrorCode.INVALID_TYPE, f"{name} must be a list, not {type(value).__name__}")
    return list(value)


def _checked(messages: Any) -> list[Message]:
    messages = _as_list(messages, "a conversation")
    for message in messages:
        if not isinstance(message, Mapping) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise InvalidRequest(
                ErrorCode.INVALID_MESSAGES,
                f'a message is {{"role": str, "content": str}}, not {message!r:.100}',
            )
    return messages


def _one_each(params: Any, num_prompts: int) -> list[SamplingParams]:
    if params is None:
        params = SamplingParams()
    if isinstance(params, SamplingParams):
        return [params] * num_prompts
    params = _as_list(params, "sampling_params")
    if len(params) != num_prompts:
        raise InvalidRequest(
            ErrorCode.INVALID_PARAMETER,
            f"{len(params)} sampling_params for {num_prompts} prompts: give one, or one each",
        )
    return params
