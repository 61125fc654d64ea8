"""From a job to what the engine takes: token ids and complete sampling parameters, checked."""

import asyncio
import hashlib
import logging
from datetime import datetime

from ingine.errors import ErrorCode, InvalidRequest
from ingine.sampling_params import SamplingParams
from ingine.tokenizer import required
from ingine.wire import Job
from worker.engine_link import EngineHost
from worker.logs import log_event

logger = logging.getLogger(__name__)

INLINE_CHARS = 4096
"""Texts shorter than this are tokenised in the loop: about a millisecond, less than a thread costs there."""


class PromptReader:
    def __init__(self, engine: EngineHost, *, log_prompts: bool):
        self._engine = engine
        self._log_prompts = log_prompts

    async def read(self, job: Job, submitted_at: datetime) -> tuple[list[int], SamplingParams]:
        """Raises InvalidRequest. A long text takes a while to tokenise, so it is done beside the event loop.

        A chat template that asks for the date gets `submitted_at`: whoever resumes the job must see the same
        prompt, also after midnight.
        """
        if _num_chars(job) < INLINE_CHARS:
            return self._read(job, submitted_at)
        return await asyncio.to_thread(self._read, job, submitted_at)

    def _read(self, job: Job, submitted_at: datetime) -> tuple[list[int], SamplingParams]:
        if self._log_prompts:
            log_event(logger, logging.INFO, "prompt", job_id=job.id, prompt=job.prompt or job.messages)
        try:
            prompt_token_ids = self._token_ids(job, submitted_at)
        except InvalidRequest:
            raise
        except Exception as error:  # a tokenizer or template that this job, of all, sets off
            message = f"the prompt cannot be tokenised: {type(error).__name__}: {error}"
            raise InvalidRequest(ErrorCode.ENGINE_ERROR, message) from error
        params = self._engine.limits.with_defaults(job.sampling)
        if params.seed is None:
            # Drawn from the job's id, so that whoever resumes it rolls the same dice.
            digest = hashlib.blake2b(job.id.encode(), digest_size=8).digest()
            params = params.model_copy(update={"seed": int.from_bytes(digest, "little") >> 1})
        self._engine.limits.validate(prompt_token_ids, params)
        return prompt_token_ids, params

    def _token_ids(self, job: Job, submitted_at: datetime) -> list[int]:
        if isinstance(job.prompt, tuple):
            return list(job.prompt)
        tokenizer = required(self._engine.tokenizer)
        if job.messages is not None:
            messages = [message.model_dump() for message in job.messages]
            return tokenizer.encode_chat(messages, now=submitted_at)
        if not job.prompt:
            raise InvalidRequest(ErrorCode.EMPTY_PROMPT, "the prompt is empty")
        return tokenizer.encode(job.prompt)


def _num_chars(job: Job) -> int:
    """Characters to tokenise; 0 for token ids."""
    if job.messages is not None:
        return sum(len(message.content) for message in job.messages)
    return len(job.prompt) if isinstance(job.prompt, str) else 0
