"""Chat templates, rendered exactly as transformers renders them, without the seconds that importing it takes.

The environment is that of `transformers.utils.chat_template_utils`, sandbox included: a template comes with a
model from anywhere, and is not to be trusted.
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
    """`special_tokens` ({"bos_token": "<s>", ...}) are variables of the template.

    May be used from several threads.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]):
        self._source = source
        self._special_tokens = dict(special_tokens)

    def render(
        self, messages: Sequence[Mapping[str, Any]], now: datetime, *, max_chars: int | None = None
    ) -> str:
        """The conversation up to the assistant's next turn. `now` is what `strftime_now` tells.

        Nothing bounds the time and memory that a template takes, only its output: whoever runs one that may
        be anybody's does so where it can be killed (`ingine.worker.hosting.prompt_process`).

        Raises jinja2.TemplateError or another exception, as the template does; TypeError for messages that
        are not JSON; InvalidRequest as soon as there are more than `max_chars` characters.
        """
        # A template may call methods of what it is given, so it gets plain values only. Keys without a value
        # are left out, since many templates would write "None".
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
        """On first use: a broken template keeps nobody from sending prompts."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals |= {"raise_exception": _raise, "dict": _Dict(), "namespace": _Namespace}
        return environment.from_string(self._source)


class _GenerationBlock(Extension):
    """`{% generation %}` marks the assistant's words for training. Here it is a scope, and nothing else."""

    tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=lineno)


class _Dict:
    """`dict` without the attributes of a class, which lead out of the sandbox."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict:
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """Refuses names that begin with an underscore, which would reach Python's own attributes."""

    def __init__(*args: Any, **kwargs: Any):  # `self` among them, so that it may be a name of the template's
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
    """jinja2's own escapes for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
