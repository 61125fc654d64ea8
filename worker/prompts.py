"""Turn a job into what the engine takes: validated token ids, complete sampling parameters, and how its
output is read as a message.
"""

import asyncio
import hashlib
import logging
import time
from collections.abc import Awaitable, Sequence
from datetime import datetime
from typing import TypeVar

from ingine.contract.chat import NamedToolChoice
from ingine.contract.jobs import Job
from ingine.engine.grammar.tools import ToolConstraint, tool_constraint
from ingine.engine.message_format import MessageFormat, NamedFunction
from ingine.engine.parsers.choice import ModelFormats
from ingine.engine.text.bad_words import encode_bad_words
from ingine.engine.text.conversation import Conversation
from ingine.engine.text.prompt_encoder import PromptEncoder
from ingine.engine.text.tokenizer import Tokenizer, required
from ingine.errors import ErrorCode, InvalidRequest
from ingine.sampling_params import SamplingParams
from ingine.worker.grammar_checks import GrammarChecks
from ingine.worker.hosting.engine_link import EngineHost
from ingine.worker.hosting.prompt_process import Kind, NoPromptProcess, PromptProcess
from ingine.worker.logs import log_event
from ingine.worker.message_formats import job_format

logger = logging.getLogger(__name__)

T = TypeVar("T")

INLINE_BYTES = 2048
"""Size up to which texts are tokenised in the event loop, if the tokenizer's worst case is known: at most a
few ms, see `benchmarks/prompt_cost.py`."""
INLINE_WORDS = 32
"""The most of a job's `bad_words` that are tokenised in the event loop: a word takes up to 40 us."""
SLOW_S = 0.001
"""After a text that took longer than this, other tasks of the loop run before the next text."""

SHORT_CHARS, SHORT_MESSAGES = 16_384, 128
"""Longer prompts are read by another process, so that short ones need not wait for them."""
SHORT_IN_FLIGHT = 8

CPU_S, CPU_S_PER_CHAR = 1.0, 20e-6
"""Processor time that reading a prompt may take: at least ten times what usual prompts of its length take."""


class PromptReader:
    """Reads short texts in the event loop, and all other prompts in processes that can be killed."""

    def __init__(self, engine: EngineHost, formats: ModelFormats | None, *, log_prompts: bool):
        """formats: what the model writes messages in; None only if it has no tokenizer."""
        self._engine = engine
        self._formats = formats
        self._log_prompts = log_prompts
        self._encoder = None
        self._turn = asyncio.Lock()
        if engine.tokenizer is not None:
            self._encoder = PromptEncoder(engine.tokenizer, engine.limits.max_num_tokens)
            definition = engine.tokenizer.definition()
            self._short = PromptProcess(definition, engine.limits, max_in_flight=SHORT_IN_FLIGHT)
            self._long = PromptProcess(definition, engine.limits, max_in_flight=1)
            self._grammars = GrammarChecks(definition, engine.limits)

    def start(self) -> None:
        """Start the process that reads conversations, if the model takes any, so that the first one need not
        wait for it."""
        if self._encoder and self._encoder.tokenizer.has_chat_template:
            self._short.start()

    async def close(self) -> None:
        """End the processes. A prompt that is not read by now is never answered."""
        if self._encoder:
            await self._short.close()
            await self._long.close()
            await self._grammars.close()

    @property
    def start_error(self) -> str | None:
        """Why no process to read prompts can be started; None if there is one, or none is needed."""
        return self._encoder and (
            self._short.start_error or self._long.start_error or self._grammars.start_error
        )

    def reads_at_once(self, job: Job) -> bool:
        """Whether `read` and `read_bad_words` take a few ms at most, and no process."""
        asked = job.sampling.structured_outputs
        knows_grammar = asked is None or self._encoder is None or self._grammars.knows(asked)
        reads_words = self._reads_words_at_once(job.sampling.bad_words)
        return knows_grammar and reads_words and self._tokenises_at_once(job)

    def _tokenises_at_once(self, job: Job) -> bool:
        if self._encoder is None or isinstance(job.prompt, tuple):
            return True
        if job.messages is not None:
            return not self._encoder.tokenizer.has_chat_template
        is_short = (
            len(job.prompt) <= INLINE_BYTES and len(job.prompt.encode(errors="replace")) <= INLINE_BYTES
        )
        return is_short and self._encoder.tokenizer.takes_linear_time

    async def read(
        self, job: Job, submitted_at: datetime, resumes: bool = False
    ) -> tuple[Sequence[int], SamplingParams]:
        """The prompt's token ids and complete sampling parameters. Raises InvalidRequest or NoPromptProcess.

        resumes: the job's log has tokens, see `RequestLimits.validate`.

        A chat template that asks for the date gets `submitted_at`, so that every attempt sees the same
        prompt, also after midnight.
        """
        if self._log_prompts:
            log_event(logger, logging.INFO, "prompt", job_id=job.id, prompt=job.prompt or job.messages)
        params, constraint = self._engine.limits.with_defaults(job.sampling), None
        if self._encoder is not None:
            constraint = constraint_of(job, self._formats, self._encoder.tokenizer)
        if constraint is not None:
            params = constraint.added_to(params)
        num_kept = self._engine.limits.num_kept_prompt_tokens(params)
        prompt_token_ids = await self._reading(job, self._token_ids(job, submitted_at, num_kept))
        prompt_token_ids = self._engine.limits.truncate(prompt_token_ids, params)
        if params.seed is None:
            # Derived from the job's id, so that every attempt draws the same random numbers.
            digest = hashlib.blake2b(job.id.encode(), digest_size=8).digest()
            params = params.model_copy(update={"seed": int.from_bytes(digest, "little") >> 1})
        self._engine.limits.validate(prompt_token_ids, params, resumes=resumes)
        if params.structured_outputs is not None:
            await self._grammars.check(job.tenant or "", params.structured_outputs, constraint)
        return prompt_token_ids, params

    async def read_bad_words(self, job: Job) -> list[list[int]]:
        """The token ids of the job's `bad_words`, in each spelling. `read` has validated the job. Raises
        InvalidRequest or NoPromptProcess.
        """
        if not (words := job.sampling.bad_words):
            return []
        if self._reads_words_at_once(words):
            return await self._reading(job, self._read_words_here(words))
        reading = self._read_beside(job, sum(map(len, words)), len(words), *words, kind=Kind.BAD_WORDS)
        return await self._reading(job, reading)

    def message_format(self, job: Job, prompt_token_ids: Sequence[int]) -> MessageFormat | None:
        """How the job's output is read as an assistant message; None: it is text alone. `read` has returned
        `prompt_token_ids`. Raises InvalidRequest.
        """
        if job.messages is None or not (job.tools or self._formats.reasoning):
            return None
        return job_format(self._formats, job, prompt_token_ids, self._engine.tokenizer)

    async def _reading(self, job: Job, reading: Awaitable[T]) -> T:
        """Return what `reading` does. Raises InvalidRequest for any exception but NoPromptProcess."""
        try:
            return await reading
        except InvalidRequest as error:
            if error.code != ErrorCode.ENGINE_ERROR:
                raise
            raise self._unreadable(job, str(error)) from error
        except NoPromptProcess:
            raise
        except Exception as error:  # a tokenizer may raise anything
            raise self._unreadable(job, f"{type(error).__name__}: {error}") from error

    def _reads_words_at_once(self, words: Sequence[str]) -> bool:
        if not words or self._encoder is None:
            return True
        return len(words) <= INLINE_WORDS and self._encoder.tokenizer.takes_linear_time

    async def _read_words_here(self, words: Sequence[str]) -> list[list[int]]:
        async with self._turn:
            return encode_bad_words(self._encoder.tokenizer, words)

    async def _token_ids(self, job: Job, submitted_at: datetime, num_kept: int | None) -> Sequence[int]:
        """The prompt's token ids, of which only the last `num_kept` are needed; None: all are."""
        if isinstance(job.prompt, tuple):
            return job.prompt
        required(self._engine.tokenizer)
        if job.messages is not None:
            return await self._read_chat(job, submitted_at, num_kept)
        if not job.prompt:
            raise InvalidRequest(ErrorCode.EMPTY_PROMPT, "the prompt is empty")
        if self._tokenises_at_once(job):
            return await self._read_here(job.prompt, num_kept)
        if num_kept is None:
            self._encoder.check_length(len(job.prompt))
        return await self._read_beside(job, len(job.prompt), 1, job.prompt, num_kept=num_kept)

    async def _read_here(self, text: str, num_kept: int | None) -> list[int]:
        encoder = self._encoder if num_kept is None else self._encoder.untruncated()
        async with self._turn:
            began = time.monotonic()
            token_ids = encoder.encode(text)
            if time.monotonic() - began > SLOW_S:
                await asyncio.sleep(0)
        return token_ids

    async def _read_chat(self, job: Job, submitted_at: datetime, num_kept: int | None) -> list[int]:
        conversation = conversation_of(job)
        if self._tokenises_at_once(job):  # there is no chat template: this raises
            return self._encoder.encode_chat(conversation)
        num_chars, num_messages = conversation.num_chars, len(conversation.messages)
        if num_kept is None:
            self._encoder.check_chat(num_messages, num_chars)
        prompt = conversation.fields(), submitted_at.timestamp()
        return await self._read_beside(job, num_chars, num_messages, *prompt, num_kept=num_kept)

    async def _read_beside(
        self,
        job: Job,
        num_chars: int,
        num_messages: int,
        *prompt: object,
        kind: Kind = Kind.PROMPT,
        num_kept: int | None = None,
    ) -> list:
        is_short = num_chars <= SHORT_CHARS and num_messages <= SHORT_MESSAGES
        process = self._short if is_short else self._long
        cpu_s = CPU_S + CPU_S_PER_CHAR * num_chars
        answer = await process.read(job.tenant or "", cpu_s, *prompt, kind=kind, num_kept=num_kept)
        if isinstance(answer, int):
            self._engine.limits.validate_length(answer)  # raises: the prompt is too long
        return answer

    def _unreadable(self, job: Job, fault: str) -> InvalidRequest:
        """The error of a job whose prompt could not be tokenised, which names only the type of the fault.

        fault: the type of the exception, a colon, and its text. The text may quote the prompt, or hold what
        only an operator may know.
        """
        kind = fault.partition(":")[0]
        said = fault if self._log_prompts else kind
        log_event(logger, logging.WARNING, "prompt not read", job_id=job.id, error=said)
        return InvalidRequest(ErrorCode.ENGINE_ERROR, f"the prompt cannot be tokenised: {kind}")


def constraint_of(job: Job, formats: ModelFormats, tokenizer: Tokenizer) -> ToolConstraint | None:
    """What enforces the job's choice of tools; None if the model is free. Raises InvalidRequest."""
    choice = job.tool_choice
    return tool_constraint(
        job.tools,
        NamedFunction(choice.function.name) if isinstance(choice, NamedToolChoice) else choice,
        parallel_tool_calls=job.parallel_tool_calls,
        tool_format=formats.tool_format,
        token_id=tokenizer.control_token_id,
    )


def conversation_of(job: Job) -> Conversation:
    """What a job with messages gives the chat template."""
    return Conversation(
        [message.model_dump(exclude_none=True) for message in job.messages],
        None if job.tools is None else list(job.tools),
        job.chat_template_kwargs or {},
        add_generation_prompt=job.add_generation_prompt,
        continue_final_message=job.continue_final_message,
        allow_special_tokens=job.allow_special_tokens,
    )
