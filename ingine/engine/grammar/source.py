"""From what a request asks to a grammar in the library's language."""

import json
import math
import re
from typing import Any

from llguidance import LLMatcher
from llguidance.gbnf_to_lark import any_to_lark

from ingine.engine.grammar.vocabulary import GrammarVocabulary
from ingine.errors import ErrorCode, InvalidRequest
from ingine.structured_outputs import StructuredOutputsParams

_META = re.compile(r"[\\.+*?()|\[\]{}^$#&\-~/]")
"""Characters with a meaning in a regular expression of Rust's."""

MAX_REASON_CHARS = 500
MAX_FORCED = 10_000
"""Times that a part may have to be repeated, for the library to look ahead for what is forced: it writes all
of that out, and `(a{1000}){1000}` would take it seconds for each mask."""
_COUNT = re.compile(r"[{~]\s*(\d+)")
_LEAST = re.compile(r'"min(?:Length|Items|Properties)"\s*:\s*(\d+)')
_MAX_DIGITS = 9
_JSON_TEXT = re.compile(r'"(?:\\.|[^"\\])*"')


def grammar_source(params: StructuredOutputsParams, vocabulary: GrammarVocabulary) -> str:
    """The grammar as `LLMatcher` takes it. Whether it compiles is not known yet.

    Raises InvalidRequest: INVALID_GRAMMAR for text that is not JSON where it must be, and for GBNF that
    cannot be read.
    """
    source = _source(params, vocabulary)
    looks_ahead = _most_repetitions(params) <= MAX_FORCED and not vocabulary.names_special(
        _literals(params, source)
    )
    return source if looks_ahead else _without_look_ahead(source)


def _literals(params: StructuredOutputsParams, source: str) -> str:
    """Text that contains what the grammar writes out, without the names of special tokens that it asks for.
    In `grammar` the two are not told apart.
    """
    match params.kind:
        case "choice":
            return "\n".join(params.choice)
        case "structural_tag":
            grammars = json.loads(source)["grammars"]
            return "\n".join(_JSON_TEXT.findall(grammars[0]["lark_grammar"]))
        case _:
            text = params.json_schema or params.regex or params.grammar or ""
            return text.replace("\\", "")


def _source(params: StructuredOutputsParams, vocabulary: GrammarVocabulary) -> str:
    match params.kind:
        case "json":
            return _of_schema(params.json_schema)
        case "json_object":
            return _of_schema('{"type": "object"}')
        case "regex":
            return LLMatcher.grammar_from_regex(params.regex)
        case "choice":
            alternatives = "|".join(_META.sub(r"\\\g<0>", text) for text in params.choice)
            return LLMatcher.grammar_from_regex(f"(?:{alternatives})")
        case "grammar":
            return _of_grammar(params.grammar)
        case _:
            return _of_structural_tag(params.structural_tag, vocabulary)


def _most_repetitions(params: StructuredOutputsParams) -> int:
    """How often a part of the output may have to be repeated: not less than it is, and often more."""
    match params.kind:
        case "regex" | "grammar":
            text = params.regex or params.grammar
            return math.prod(map(_at_least_one, _COUNT.findall(text))) * math.prod(
                map(_at_least_one, _LEAST.findall(text))
            )
        case "json" | "structural_tag":
            text = params.json_schema or params.structural_tag
            patterns = (
                math.prod(map(_at_least_one, _COUNT.findall(one))) for one in _JSON_TEXT.findall(text)
            )
            return max(patterns, default=1) * math.prod(map(_at_least_one, _LEAST.findall(text)))
    return 1


def _at_least_one(digits: str) -> int:
    return max(1, int(digits[:_MAX_DIGITS]))


def _without_look_ahead(source: str) -> str:
    grammars = json.loads(source)["grammars"]
    for grammar in grammars:
        schema = grammar.pop("json_schema", None)
        lark = grammar["lark_grammar"] if schema is None else f"start: %json {json.dumps(schema)}"
        grammar["lark_grammar"] = f'%llguidance {{"no_forcing": true}}\n{lark}'
    return json.dumps({"grammars": grammars})


def _of_schema(schema: str) -> str:
    try:
        # With overrides the text is parsed, without it would be pasted.
        return LLMatcher.grammar_from_json_schema(schema, overrides={})
    except ValueError as error:
        raise refused(f"json is no schema: {error}") from None


def _of_grammar(grammar: str) -> str:
    try:
        lark = any_to_lark(grammar)
    except RecursionError:
        raise refused("grammar: nested too deep", ErrorCode.GRAMMAR_TOO_COSTLY) from None
    except Exception as error:  # the converter raises bare ones, and what comes of reading past the end
        raise refused(f"grammar is neither Lark (with a rule `start`) nor GBNF: {error}") from None
    return json.dumps({"grammars": [{"lark_grammar": lark}]})


def _of_structural_tag(text: str, vocabulary: GrammarVocabulary) -> str:
    """Return the grammar of a structural tag, like `llguidance.StructTag.to_grammar`, which however takes
    either all triggers of the form <...> for special tokens or none."""
    structures, triggers = _read_structural_tag(text)
    rules = []
    for index, structure in enumerate(structures):
        begin, end = structure["begin"], structure["end"]
        trigger = next((trigger for trigger in triggers if begin.startswith(trigger)), None)
        if trigger is None:
            raise refused(f"structural_tag: no trigger begins {begin!r:.100}")
        body = f"{_literal(begin[len(trigger) :])} %json {json.dumps(structure['schema'])} {_literal(end)}"
        rules.append(f"tag_{index}_spelled[lazy]: TAG_TEXT {_literal(trigger)}")
        begins = f"tag_{index}_spelled"
        if vocabulary.is_special(trigger):  # a special token is not text, but its name may be spelled
            begins = f"({begins} | TAG_TEXT <[{vocabulary.token_id(trigger)}]>)"
        rules.append(f"tag_{index}: {begins} {body}")
    tags = " | ".join(f"tag_{index}" for index in range(len(structures)))
    head = ["%llguidance {}", f"start: ({tags})* tag_end", "tag_end: TAG_TEXT", r"TAG_TEXT: /(.|\n)*/"]
    return json.dumps({"grammars": [{"lark_grammar": "\n".join([*head, *rules])}]})


def _read_structural_tag(text: str) -> tuple[list[dict[str, Any]], list[str]]:
    try:
        tag = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise refused(f"structural_tag is not JSON: {error}") from None
    if isinstance(tag, dict) and "format" in tag:
        raise refused(
            "structural_tag: `format` is not supported, `structures` are", ErrorCode.UNSUPPORTED_GRAMMAR
        )
    tag = tag if isinstance(tag, dict) else {}
    structures, triggers = tag.get("structures"), tag.get("triggers")
    if not (_are(structures, dict) and _are(triggers, str) and all(triggers)):
        raise refused("structural_tag has lists `structures` and `triggers`, neither of them empty")
    for structure in structures:
        texts = (structure.get("begin"), structure.get("end"))
        if not all(isinstance(text, str) for text in texts) or not isinstance(structure.get("schema"), dict):
            raise refused("structural_tag: each structure has texts `begin` and `end` and a `schema`")
    return structures, triggers


def _are(values: Any, kind: type) -> bool:
    return isinstance(values, list) and bool(values) and all(isinstance(value, kind) for value in values)


def _literal(text: str) -> str:
    return json.dumps(text) if text else ""


def refused(message: str, code: ErrorCode = ErrorCode.INVALID_GRAMMAR) -> InvalidRequest:
    """message: in one line, beginning with the field that it is about."""
    return InvalidRequest(code, f"structured_outputs.{message}"[:MAX_REASON_CHARS])
