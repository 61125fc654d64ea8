"""Sequences whose grammars are being compiled: they take no place in a batch, and nothing waits for them."""

from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait

from ingine.engine.grammar.state import GrammarState
from ingine.engine.schedule.sequence import Sequence
from ingine.errors import ErrorCode, InvalidRequest

WAIT_S = 0.01
"""How long an engine that has nothing else to do waits before it looks for new requests again."""


class CompilingSequences:
    def __init__(self) -> None:
        self._futures: dict[Sequence, Future[GrammarState]] = {}

    def __len__(self) -> int:
        return len(self._futures)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._futures)

    def add(self, seq: Sequence, state: Future[GrammarState]) -> None:
        self._futures[seq] = state

    def remove(self, seq: Sequence) -> bool:
        """Forget a sequence. Returns False if it is not here."""
        future = self._futures.pop(seq, None)
        if future is not None:
            future.cancel()
        return future is not None

    def take_done(self) -> list[tuple[Sequence, InvalidRequest | None]]:
        """Remove the sequences whose states are there, which they have now, and those whose have failed, with
        the reason.
        """
        done = [(seq, future) for seq, future in self._futures.items() if future.done()]
        return [(seq, self._take(seq, future)) for seq, future in done]

    def wait(self) -> None:
        """Until one is done, but not for long. Returns at once if there are none."""
        if self._futures:
            wait(self._futures.values(), WAIT_S, FIRST_COMPLETED)

    def _take(self, seq: Sequence, future: Future[GrammarState]) -> InvalidRequest | None:
        del self._futures[seq]
        try:
            seq.grammar = future.result()
        except InvalidRequest as error:
            return error
        except Exception as error:  # a bug of the library's, which is this grammar's alone
            return InvalidRequest(ErrorCode.GRAMMAR_FAILED, f"structured_outputs: {error!r:.200}")
        return None
