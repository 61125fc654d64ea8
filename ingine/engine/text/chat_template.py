"""Renders chat templates exactly as transformers does, without importing it, which takes seconds.

The jinja2 environment is that of `transformers.utils.chat_template_utils`, including its sandbox: a template
comes with a model of any origin, and is not trusted.
"""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ingine.errors import ErrorCode, InvalidRequest

_REASONING_NAMES = ("reasoning_content", "thinking", "reasoning")
_FINAL_TAG = "CONTINUE_FINAL_MESSAGE_TAG "
"""Shows where the final message's text ends in the prompt, and whether the template has trimmed it."""
_NOT_ASCII = re.compile("[^\\x00-~\U000f0000-\U000ffffd]")
"""But for the private-use characters that mark control tokens, which are not to be hidden in escapes."""


class ChatTemplate:
    """Renders conversations with one chat template. It can be used from several threads.

    special_tokens: variables of the template by role, such as {"bos_token": "<s>"}.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]):
        self.source = source
        self._special_tokens = dict(special_tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        now: datetime,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        max_chars: int | None = None,
    ) -> str:
        """Render a conversation as `apply_chat_template` does with the same arguments.

        now: the time that the template's `strftime_now` formats.
        variables: further variables of the template.

        Only the output of a template is bounded, not its time and memory. An untrusted template should run
        where it can be killed (`ingine.worker.hosting.prompt_process`).

        Raises jinja2.TemplateError or any other exception that the template raises; TypeError for arguments
        that are not JSON; ValueError if the final message cannot be continued; InvalidRequest as soon as the
        output has more than `max_chars` characters.
        """
        # A template may call methods of its arguments, so they are plain values only.
        messages = [_with_reasoning_names(message) for message in plain(_without_none(messages))]
        final = None
        if continue_final_message:
            if add_generation_prompt:
                raise ValueError("continue_final_message and add_generation_prompt exclude each other")
            final = _tag_final_text(messages)
        text = self._generate(
            self._special_tokens
            | {"documents": None, "strftime_now": lambda directives: now.strftime(directives)}
            | plain(variables or {})
            | {
                "messages": messages,
                "tools": None if tools is None else plain(tools),
                "add_generation_prompt": add_generation_prompt,
            },
            max_chars,
        )
        return text if final is None else _cut_at_tag(text, final)

    def _generate(self, variables: dict[str, Any], max_chars: int | None) -> str:
        pieces: list[str] = []
        num_chars = 0
        for piece in self._compiled.generate(variables):
            pieces.append(piece)
            num_chars += len(piece)
            if max_chars is not None and num_chars > max_chars:
                raise InvalidRequest(
                    ErrorCode.PROMPT_TOO_LONG,
                    "the model's chat template makes more text of these messages than the model's length "
                    f"allows, which is {max_chars} characters",
                )
        return "".join(pieces)

    @cached_property
    def literals(self) -> str:
        """The texts that the template itself writes or compares with, with NUL between them."""
        tree = _environment().parse(self.source)
        found = {node.data for node in tree.find_all(nodes.TemplateData)}
        found |= {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
        return "\0".join(sorted(found))

    @cached_property
    def _compiled(self) -> jinja2.Template:
        """Compiled on first use, so that a broken template does not prevent plain prompts."""
        return _environment().from_string(self.source)


def plain(value: Any) -> Any:
    """A copy of `value` of plain JSON types. Raises TypeError or ValueError if it is not JSON."""
    return json.loads(json.dumps(value))


def _without_none(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Many templates would write "None", or take a key for its value."""
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def _with_reasoning_names(message: dict[str, Any]) -> dict[str, Any]:
    """Templates read the reasoning under different names, and clients send it under as many."""
    reasoning = next((message[name] for name in _REASONING_NAMES if name in message), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _tag_final_text(messages: list[dict[str, Any]]) -> str:
    """Put a tag behind the text of the final message. Returns the text."""
    content = messages[-1].get("content")
    if isinstance(content, str):
        messages[-1]["content"] = content + _FINAL_TAG
        return content
    for part in reversed(content or ()):
        if "text" in part:
            text = part["text"]
            part["text"] = text + _FINAL_TAG
            return text
    raise ValueError("the final message has no text to continue")


def _cut_at_tag(rendered: str, final: str) -> str:
    """The prompt up to the end of the final message's text."""
    at = rendered.rfind(_FINAL_TAG.strip())
    if at < 0 or final.strip() not in rendered:
        raise ValueError("the chat template leaves out the final message, which is to be continued")
    keeps_space = rendered.startswith(_FINAL_TAG, at)
    return rendered[:at] if keeps_space else rendered[:at].rstrip()


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _raise, "dict": _Dict(), "namespace": _Namespace}
    return environment


class _GenerationBlock(Extension):
    """Parses `{% generation %}`, which marks the assistant's words for training, as a plain scope."""

    tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=lineno)


class _Dict:
    """Stands in for `dict` without the attributes of a class, which lead out of the sandbox."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict:
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """Rejects names that begin with an underscore, which would reach Python's own attributes."""

    def __init__(*args: Any, **kwargs: Any):  # `self` is in args, so that a template may use that name
        self, *rest = args
        for name in dict(*rest, **kwargs):
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, *rest, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace has no attribute {name!r} for a chat template")


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Serialise `value` without the escapes for HTML that jinja2's own `tojson` makes."""
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
    return _NOT_ASCII.sub(lambda char: json.dumps(char[0])[1:-1], text) if ensure_ascii else text
