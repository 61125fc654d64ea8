"""From what a request asks to a grammar that can be enforced, or the reason why it cannot.

What a grammar may cost is counted in the library's own units of work and never in seconds, so a grammar that
is accepted on one machine is accepted on every other, and a busy one enforces the same as an idle one.
"""

import re
import threading
from collections import OrderedDict
from concurrent.futures import Future
from dataclasses import dataclass

from llguidance import LLMatcher, LLParserLimits

from ingine.engine.grammar.schemas import enforced
from ingine.engine.grammar.source import grammar_source, refused
from ingine.engine.grammar.vocabulary import GrammarVocabulary
from ingine.errors import ErrorCode, InvalidRequest
from ingine.structured_outputs import StructuredOutputsParams

LIMITS = {
    "max_items_in_row": 2_000,
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 500_000,
    "verbose_errors": False,
}
"""llguidance's own defaults, but for states (a kilobyte or two each, 250,000 by default) and errors, which
would quote the grammar and the output."""

MAX_CACHED_GRAMMARS = 64
MAX_CACHED_BYTES = 4 << 20
"""Of the texts of all cached grammars. What is compiled from a text takes a multiple of it."""

_TOO_COSTLY = re.compile(
    r"too (large|big|complex|many|deep)|nest limit|items; max is|fuel|limit|exceed|precomputation failed",
    re.I,
)
_UNSUPPORTED = re.compile(
    r"unimplemented|unsupported|not (fully )?supported|unknown (format|keyword)|can't determine|not disjoint"
    r"|not present in a registry|only supported|unable to determine|failed to generate regex",
    re.I,
)
_REGEX_FAULT = re.compile(r"regex parse error: .* error: (.*?)(?: \d+ \| .*)?$")


@dataclass(frozen=True, eq=False)
class CompiledGrammar:
    """A grammar at its start, for any number of sequences."""

    vocabulary: GrammarVocabulary
    source: str
    _start: LLMatcher
    _lock: threading.Lock

    def matcher(self) -> LLMatcher:
        """A matcher at the start of the grammar. It shares the states of the lexer with the others, so that
        what one sequence has explored costs the next nothing."""
        with self._lock:
            return self._start.deep_copy()

    def matcher_of_its_own(self) -> LLMatcher:
        """A matcher that shares nothing: what it may cost depends on what it reads alone. Slow: it
        compiles, so never call this within a step."""
        return _matcher(self.source, self.vocabulary)


class GrammarCompiler:
    """Compiles grammars for one vocabulary, and keeps the latest ones. For use from several threads."""

    def __init__(
        self,
        vocabulary: GrammarVocabulary,
        *,
        max_grammars: int = MAX_CACHED_GRAMMARS,
        max_bytes: int = MAX_CACHED_BYTES,
    ):
        self.vocabulary = vocabulary
        self._max_grammars, self._max_bytes = max_grammars, max_bytes
        self._cached: OrderedDict[StructuredOutputsParams, tuple[CompiledGrammar, int]] = OrderedDict()
        self._num_bytes = 0
        self._compiling: dict[StructuredOutputsParams, Future[CompiledGrammar]] = {}
        self._lock = threading.Lock()

    def compile(self, params: StructuredOutputsParams) -> CompiledGrammar:
        """Return the grammar. A second thread that asks for the same one waits for the first.

        Raises InvalidRequest: INVALID_GRAMMAR, UNSUPPORTED_GRAMMAR naming what cannot be enforced, or
        GRAMMAR_TOO_COSTLY. What raises is not cached.
        """
        with self._lock:
            if params in self._cached:
                self._cached.move_to_end(params)
                return self._cached[params][0]
            other, ours = self._compiling.get(params), Future()
            if other is None:
                self._compiling[params] = ours
        return self._compile(params, ours) if other is None else other.result()

    def _compile(self, params: StructuredOutputsParams, result: Future[CompiledGrammar]) -> CompiledGrammar:
        try:
            grammar = self._compiled(params)
            self._keep(params, grammar)
        except BaseException as error:  # a panic of the library's among them
            result.set_exception(error)
            raise
        else:
            result.set_result(grammar)
        finally:
            with self._lock:
                del self._compiling[params]
        return grammar

    def _compiled(self, params: StructuredOutputsParams) -> CompiledGrammar:
        source = grammar_source(params, self.vocabulary)
        if params.kind not in ("regex", "choice"):
            source = enforced(source, params.kind, self._is_satisfiable)
        start = _checked(source, params.kind, self.vocabulary)
        return CompiledGrammar(self.vocabulary, source, start, threading.Lock())

    def forget(self, grammar: CompiledGrammar) -> None:
        """Remove a grammar from the cache. An error in the lexer that its matchers share stays there, and
        would be one of each new matcher."""
        with self._lock:
            for params, (kept, num_bytes) in self._cached.items():
                if kept is grammar:
                    del self._cached[params]
                    self._num_bytes -= num_bytes
                    return

    def _is_satisfiable(self, source: str) -> bool:
        return not _matcher(source, self.vocabulary).is_error()

    def _keep(self, params: StructuredOutputsParams, grammar: CompiledGrammar) -> None:
        num_bytes = len(grammar.source)
        with self._lock:
            self._cached[params] = (grammar, num_bytes)
            self._num_bytes += num_bytes
            while len(self._cached) > self._max_grammars or self._num_bytes > self._max_bytes:
                _, (_, num_bytes) = self._cached.popitem(last=False)
                self._num_bytes -= num_bytes


def _checked(source: str, kind: str, vocabulary: GrammarVocabulary) -> LLMatcher:
    """A matcher at the start of the grammar that enforces all of it, and has something to begin with."""
    matcher = _matcher(source, vocabulary)
    if matcher.is_error():
        raise _refused(kind, matcher.get_error())
    if warnings := matcher.get_grammar_warnings():
        message = f"{kind}: part of it would be ignored: {one_line(warnings[0])}"
        raise refused(message, ErrorCode.UNSUPPORTED_GRAMMAR)
    _try_first_masks(matcher.deep_copy(), kind, vocabulary)
    return matcher


def _try_first_masks(matcher: LLMatcher, kind: str, vocabulary: GrammarVocabulary) -> None:
    """Compute the masks at the beginning of the output and of an object's first key, to find a grammar that
    exceeds the limits of a step there: each of its optional properties is a possible continuation."""
    for text in ("", "{", '"'):
        goes_on = not text or matcher.try_consume_tokens(vocabulary.ll_tokenizer.greedy_tokenize(text))
        if goes_on:
            matcher.compute_bitmask()
        if matcher.is_error():
            raise _refused(kind, matcher.get_error())
        if not goes_on:
            return


def _matcher(source: str, vocabulary: GrammarVocabulary) -> LLMatcher:
    return LLMatcher(vocabulary.ll_tokenizer, source, log_level=0, limits=LLParserLimits(**LIMITS))


def _refused(kind: str, error: str) -> InvalidRequest:
    if error.startswith("NoExtension"):
        return refused(f"{kind}: nothing satisfies it")
    if _TOO_COSTLY.search(error):
        code = ErrorCode.GRAMMAR_TOO_COSTLY
    elif _UNSUPPORTED.search(error):
        code = ErrorCode.UNSUPPORTED_GRAMMAR
    else:
        code = ErrorCode.INVALID_GRAMMAR
    return refused(f"{kind}: {one_line(error)}", code)


def one_line(error: str) -> str:
    """An error of the library's, without the regular expression that it quotes, which may be long, what it
    appends about its state, and advice that leads to another refusal."""
    text = " ".join(error.partition("\n<")[0].split()).partition(". Enable 'coerce_one_of'")[0]
    if fault := _REGEX_FAULT.search(text):
        return f"invalid regex: {fault[1]}"
    return text
