"""The engine for offline use, with the API of vLLM's `LLM`."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from itertools import count
from typing import Any, NamedTuple
from uuid import uuid4

from ingine.engine.config import EngineConfig
from ingine.engine.engine import Engine
from ingine.engine.grammar.tools import ToolConstraint, tool_constraint
from ingine.engine.llm_arguments import (
    NEUTRAL_OPTIONS,
    Message,
    Prompt,
    as_list,
    checked_messages,
    is_one_prompt,
    is_token_ids,
    one_each,
    refuse_unsupported,
)
from ingine.engine.message_format import MessageFormat
from ingine.engine.outputs import CompletionOutput, RequestOutput, RequestTimings, SeqOutput
from ingine.engine.parsers.choice import formats_of
from ingine.engine.request import EngineRequest
from ingine.engine.store.model_store import DEFAULT_MODEL
from ingine.engine.text.conversation import Conversation
from ingine.engine.text.message_request import message_format
from ingine.engine.text.prompt_encoder import PromptEncoder
from ingine.engine.text.tokenizer import required
from ingine.errors import ConfigError, ErrorCode, InvalidRequest
from ingine.sampling_params import SamplingParams, is_neutral

__all__ = ["LLM", "CompletionOutput", "RequestOutput"]


class LLM:
    """Loads a model, and generates the outputs of all prompts of a call in one continuous batch.

    >>> from ingine import LLM, SamplingParams
    >>> llm = LLM()
    >>> llm.chat([{"role": "user", "content": "Hi!"}], SamplingParams(max_tokens=32))[0].outputs[0].text
    """

    def __init__(self, model: str = DEFAULT_MODEL, **options: Any):
        """`options` are the fields of `EngineConfig`. Options of vLLM are accepted if they change nothing.

        Raises ConfigError for an unknown option or a wrong value.
        """
        for name in options.keys() & NEUTRAL_OPTIONS.keys():
            if not is_neutral(options.pop(name), NEUTRAL_OPTIONS[name]):
                raise ConfigError(f"{name} is not supported: leave it out")
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
        use_tqdm: bool = True,
        **neutral: Any,
    ) -> list[RequestOutput]:
        """Generate one output for each prompt, which has `n` choices. Blocks until all are finished, and
        returns them in the order of the prompts.

        sampling_params: one for all prompts, or a list with one for each. None takes the model's own, see
        `get_default_sampling_params`; a SamplingParams is used as it is. Without max_tokens an output may be
        as long as the model's maximum length allows (vLLM's default is 16 tokens). use_tqdm: show a progress
        bar on stderr, if it is a terminal. Other arguments of vLLM are accepted at their defaults.

        Raises InvalidRequest before anything runs, if a prompt or parameter is wrong. If the call is
        interrupted, its requests are aborted, and the engine remains usable.
        """
        refuse_unsupported("generate", neutral)
        prompts = [prompts] if is_one_prompt(prompts) else as_list(prompts, "prompts")
        params = self._one_each(sampling_params, len(prompts))
        tokenized = [self._tokenize(prompt, each) for prompt, each in zip(prompts, params, strict=True)]
        return self._run(tokenized, params, use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        parallel_tool_calls: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        allow_special_tokens: bool = False,
        **neutral: Any,
    ) -> list[RequestOutput]:
        """Generate the reply to a conversation, or to each of a list of conversations, using the model's chat
        template. Otherwise like `generate`.

        The reply is also a message: `CompletionOutput.message`, with the reasoning and the tool calls of the
        model's own format.

        tools, chat_template_kwargs, add_generation_prompt, continue_final_message: as in vLLM.
        tool_choice: OpenAI's; None is `auto`. With `none` tools are shown to the model, and what it writes is
            content. `required`, a named function, and functions that are `strict` constrain the output as
            `SamplingParams.structured_outputs` does, which may not be given beside them.
        parallel_tool_calls: False allows one call at most, and constrains the output likewise.
        allow_special_tokens: special tokens in the texts of messages, tools and chat_template_kwargs are
            special tokens, as in vLLM and transformers. Otherwise they are text.
        """
        refuse_unsupported("chat", neutral)
        conversations = as_list(messages, "messages")
        if conversations and isinstance(conversations[0], Mapping):
            conversations = [conversations]
        params = self._one_each(sampling_params, len(conversations))
        prompts = [
            self._chat_prompt(
                Conversation(
                    checked_messages(messages),
                    tools and as_list(tools, "tools"),
                    chat_template_kwargs or {},
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=continue_final_message,
                    allow_special_tokens=allow_special_tokens,
                ),
                each,
                tool_choice,
                parallel_tool_calls=parallel_tool_calls,
            )
            for messages, each in zip(conversations, params, strict=True)
        ]
        params = [
            each if prompt.constraint is None else prompt.constraint.added_to(each)
            for prompt, each in zip(prompts, params, strict=True)
        ]
        replies = self._run(prompts, params, use_tqdm)
        for reply, prompt, each in zip(replies, prompts, params, strict=True):
            if prompt.format is None and each.detokenize:
                _take_text_as_message(reply)
        return replies

    @property
    def encoder(self) -> PromptEncoder:
        """The encoder of prompts. Raises InvalidRequest if the model has no tokenizer."""
        return PromptEncoder(required(self.engine.tokenizer), self.engine.limits.max_num_tokens)

    def encoder_for(self, params: SamplingParams) -> PromptEncoder:
        """The encoder of prompts that `params` may truncate, see `RequestLimits.num_kept_prompt_tokens`."""
        is_truncated = isinstance(params, SamplingParams) and params.truncate_prompt_tokens is not None
        return self.encoder.untruncated() if is_truncated else self.encoder

    def get_default_sampling_params(self) -> SamplingParams:
        """The model's parameters from its generation_config.json, with neutral values for those it lacks."""
        return self.engine.limits.with_defaults(SamplingParams())

    def _one_each(
        self, params: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int
    ) -> list[SamplingParams]:
        return one_each(self.get_default_sampling_params() if params is None else params, num_prompts)

    def _chat_prompt(
        self,
        conversation: Conversation,
        params: SamplingParams,
        tool_choice: str | Mapping[str, Any] | None,
        *,
        parallel_tool_calls: bool,
    ) -> "_Prompt":
        token_ids = self.encoder_for(params).encode_chat(conversation)
        tokenizer = required(self.engine.tokenizer)
        formats = formats_of(self.engine.model_config.model_type, tokenizer.chat_template)
        format = message_format(
            formats,
            conversation,
            token_ids,
            tokenizer,
            tool_choice=tool_choice,
            key=uuid4().hex,  # no two calls of a conversation have the same id, whoever has made them
        )
        constraint = tool_constraint(
            conversation.tools,
            "none" if format is None else format.tool_choice,
            parallel_tool_calls=parallel_tool_calls,
            tool_format=formats.tool_format,
            token_id=tokenizer.control_token_id,
        )
        return _Prompt(None, token_ids, format, constraint)

    def _tokenize(self, prompt: Prompt, params: SamplingParams) -> "_Prompt":
        text, token_ids = prompt, None
        if isinstance(prompt, Mapping):
            given = {name: value for name, value in prompt.items() if value is not None}
            text, token_ids = given.pop("prompt", None), given.pop("prompt_token_ids", None)
            if given:
                raise InvalidRequest(
                    ErrorCode.INVALID_PARAMETER, f"a prompt's {', '.join(map(str, given))} is not supported"
                )
        elif is_token_ids(prompt):
            text, token_ids = None, prompt
        if token_ids is not None:
            return _Prompt(text, as_list(token_ids, "prompt_token_ids"))
        if isinstance(text, str):
            return _Prompt(text, self.encoder_for(params).encode(text))
        raise InvalidRequest(
            ErrorCode.INVALID_TYPE,
            'a prompt is a str, a list of token ids, {"prompt": "..."} or {"prompt_token_ids": [...]}, '
            f"not {prompt!r:.100}",
        )

    def _run(
        self, prompts: list["_Prompt"], params: list[SamplingParams], shows_progress: bool
    ) -> list[RequestOutput]:
        requests = []
        for prompt, each in zip(prompts, params, strict=True):
            kept = self.engine.limits.truncate(prompt.token_ids, each)
            self.engine.limits.validate(kept, each)
            if prompt.constraint is not None:
                prompt.constraint.compile(self.engine.grammars.compile)
            elif each.structured_outputs is not None:
                self.engine.grammars.compile(each.structured_outputs)
            requests.append(_new_output(str(next(self._request_ids)), prompt.text, kept, each.n))
        try:
            for request, prompt, each in zip(requests, prompts, params, strict=True):
                token_ids = request.prompt_token_ids
                self.engine.add(EngineRequest(request.request_id, token_ids, each, message=prompt.format))
            self._finish({request.request_id: request for request in requests}, shows_progress)
        except BaseException:  # Ctrl-C above all
            for request in requests:
                self.engine.abort(request.request_id)
            raise
        return requests

    def _finish(self, requests: dict[str, RequestOutput], shows_progress: bool) -> None:
        shows_progress = shows_progress and sys.stderr is not None and sys.stderr.isatty()
        with _progress_bar(len(requests)) if shows_progress else nullcontext(_show_nothing) as show_finished:
            num_finished = 0
            while num_finished < len(requests):
                for output in self.engine.step():
                    _update(requests[output.seq_id], output)
                    num_finished += output.ends_request
                show_finished(num_finished)


class _Prompt(NamedTuple):
    text: str | None
    token_ids: list[int]
    format: MessageFormat | None = None
    """How the output is read as a message."""
    constraint: ToolConstraint | None = None
    """What enforces the choice of tools. The request's parameters have it too."""


@contextmanager
def _progress_bar(num_prompts: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar. Yields a function to call with the number of finished prompts."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.completed}/{task.total} prompts"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        row = bar.add_task("", total=num_prompts)
        yield lambda num_finished: bar.update(row, completed=num_finished)


def _show_nothing(num_finished: int) -> None:
    pass


def _new_output(
    request_id: str, prompt: str | None, prompt_token_ids: list[int], num_choices: int
) -> RequestOutput:
    return RequestOutput(
        request_id=request_id,
        prompt=prompt,
        prompt_token_ids=prompt_token_ids,
        outputs=[CompletionOutput(index, "", [], None, None, None) for index in range(num_choices)],
        finished=False,
        num_cached_tokens=0,
        usage={},
        timings=RequestTimings(arrival_time=time.time()),
    )


def _take_text_as_message(reply: RequestOutput) -> None:
    for completion in reply.outputs:
        if completion.finish_reason is not None and completion.finish_reason.is_complete:
            completion.message = {"role": "assistant", "content": completion.text}


def _update(request: RequestOutput, output: SeqOutput) -> None:
    """Add the output of a step to its request."""
    completion, timings = request.outputs[output.index], request.timings
    completion.text += output.text + output.final_text
    completion.token_ids += output.token_ids
    if output.prompt_logprobs is not None:
        request.prompt_logprobs = output.prompt_logprobs
    if output.logprobs:
        completion.logprobs = (completion.logprobs or []) + output.logprobs
        added = sum(entry["logprob"] for entry in output.logprobs)
        completion.cumulative_logprob = (completion.cumulative_logprob or 0.0) + added
    if output.token_ids and timings.first_token_time is None:
        timings.first_token_time = time.time()
    if output.finish_reason is None:
        return
    completion.finish_reason, completion.stop_reason = output.finish_reason, output.stop_reason
    completion.message = output.message and output.message.to_openai()
    if output.index == 0:  # later choices find the prompt that it has computed
        request.num_cached_tokens = output.num_cached_tokens
    if output.others_run:
        return
    request.finished = True
    request.usage = {
        "num_prompt_tokens": output.num_prompt_tokens,
        "num_cached_tokens": request.num_cached_tokens,
        "num_output_tokens": sum(len(each.token_ids) for each in request.outputs),
    }
    timings.finished_time = time.time()
