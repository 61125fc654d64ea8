"""Compiling grammars beside the engine's thread."""

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock

from ingine.engine.grammar.compiler import CompiledGrammar, GrammarCompiler
from ingine.engine.grammar.reasoning import reasoning_tokens
from ingine.engine.grammar.state import GrammarState
from ingine.engine.grammar.vocabulary import GrammarVocabulary
from ingine.engine.request import EngineRequest
from ingine.engine.text.panics import panics_as_errors
from ingine.errors import ErrorCode, InvalidRequest
from ingine.structured_outputs import StructuredOutputsParams

NUM_THREADS = 2


class GrammarPool:
    """Makes the states of constrained sequences in threads. The library releases the interpreter's lock."""

    def __init__(self, make_vocabulary: Callable[[], GrammarVocabulary]):
        """make_vocabulary: called once, for the first grammar. What it raises is raised for each."""
        self._make_vocabulary = make_vocabulary
        self._made: GrammarCompiler | None = None
        self._making = Lock()
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="grammar")

    def compile(self, params: StructuredOutputsParams) -> CompiledGrammar:
        """In the caller's thread. Raises InvalidRequest as `GrammarCompiler.compile` does."""
        with panics_as_errors():
            return self._compiler().compile(params)

    def begin(self, request: EngineRequest, index: int, eos_token_ids: Iterable[int]) -> Future[GrammarState]:
        """The state of a choice after its earlier output. The future raises InvalidRequest as `compile` and
        `reasoning_tokens` do, and GRAMMAR_FAILED if the tokens are not of the grammar."""

        def make() -> GrammarState:
            params = request.params
            grammar = self.compile(params.structured_outputs)
            reasoning = reasoning_tokens(request.message, grammar.vocabulary)
            state = GrammarState(grammar, params, eos_token_ids=eos_token_ids, reasoning=reasoning)
            if not state.accept(request.output_of(index)) and state.is_in_doubt:
                self._compiler().forget(state.grammar)
                state = state.decide()
            if state.error is not None:
                raise InvalidRequest(
                    ErrorCode.GRAMMAR_FAILED, f"the output so far is not of its grammar: {state.error}"
                )
            return state

        return self._threads.submit(panics_as_errors()(make))

    def decide(self, state: GrammarState) -> Future[GrammarState]:
        """Call `GrammarState.decide`, and let new sequences share a lexer that is without errors. The future
        raises GRAMMAR_FAILED if the tokens are not of the grammar."""
        self._compiler().forget(state.grammar)

        def make() -> GrammarState:
            decided = state.decide()
            if decided.error is not None:
                raise InvalidRequest(ErrorCode.GRAMMAR_FAILED, decided.error)
            return decided

        return self._threads.submit(panics_as_errors()(make))

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _compiler(self) -> GrammarCompiler:
        with self._making:
            if self._made is None:
                self._made = GrammarCompiler(self._make_vocabulary())
            return self._made
