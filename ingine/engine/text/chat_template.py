"""Renders chat templates exactly as transformers does, without importing it, which takes seconds.

The jinja2 environment is that of `transformers.utils.chat_template_utils`, including its sandbox: a template
comes with a model of any origin, and is not trusted.
"""

import json
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


class ChatTemplate:
    """Renders conversations with one chat template. It can be used from several threads.

    special_tokens: variables of the template by role, such as {"bos_token": "<s>"}.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]):
        self._source = source
        self._special_tokens = dict(special_tokens)

    def render(
        self, messages: Sequence[Mapping[str, Any]], now: datetime, *, max_chars: int | None = None
    ) -> str:
        """Render the conversation up to the start of the assistant's next turn. `now` is the time that the
        template's `strftime_now` formats.

        Only the output of a template is bounded, not its time and memory. An untrusted template should run
        where it can be killed (`ingine.worker.hosting.prompt_process`).

        Raises jinja2.TemplateError or any other exception that the template raises; TypeError for messages
        that are not JSON; InvalidRequest as soon as the output has more than `max_chars` characters.
        """
        # A template may call methods of its arguments, so they are plain values only. Keys whose value is
        # None are dropped, since many templates would write "None".
        plain = [{k: v for k, v in message.items() if v is not None} for message in messages]
        pieces: list[str] = []
        num_chars = 0
        for piece in self._compiled.generate(
            **self._special_tokens,
            messages=json.loads(json.dumps(plain)),
            tools=None,
            documents=None,
            add_generation_prompt=True,
            strftime_now=lambda directives: now.strftime(directives),
        ):
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
    def _compiled(self) -> jinja2.Template:
        """Compiled on first use, so that a broken template does not prevent plain prompts."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals |= {"raise_exception": _raise, "dict": _Dict(), "namespace": _Namespace}
        return environment.from_string(self._source)


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
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
