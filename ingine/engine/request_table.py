"""The unfinished requests of an engine, each with its sequences, and the ends of these."""

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from ingine.engine.grammar.state import GrammarState
from ingine.engine.outputs import FinishReason, SeqOutput
from ingine.engine.schedule.compiling import CompilingSequences
from ingine.engine.schedule.scheduler import Scheduler
from ingine.engine.schedule.sequence import Sequence
from ingine.errors import EngineError


class RequestTable:
    """Every unfinished sequence is in one place: in the scheduler, in `compiling`, or among those that have
    ended without a step and whose end is still to be reported.
    """

    def __init__(self, scheduler: Scheduler, end_drafting: Callable[[Sequence], None]):
        """end_drafting: called with each sequence that ends in or before a step."""
        self._scheduler = scheduler
        self._end_drafting = end_drafting
        self._seqs: dict[str, list[Sequence]] = {}
        """The unfinished sequences of each request."""
        self._ended_without_step: list[Sequence] = []
        self.compiling = CompilingSequences()

    def __len__(self) -> int:
        return len(self._seqs)

    def __contains__(self, seq_id: str) -> bool:
        return seq_id in self._seqs

    def seqs_of(self, seq_id: str) -> list[Sequence]:
        """The unfinished sequences of a request; none if there is no such request."""
        return list(self._seqs.get(seq_id, ()))

    def add(
        self, seqs: list[Sequence], begin_grammar: Callable[[Sequence], Future[GrammarState]] | None
    ) -> None:
        """Add the sequences of a request. begin_grammar: starts to compile a sequence's grammar; None if it
        has none.
        """
        self._seqs[seqs[0].seq_id] = list(seqs)
        for seq in seqs:
            if seq.finish_reason is not None:
                self._ended_without_step.append(seq)
            elif begin_grammar is not None:
                self.compiling.add(seq, begin_grammar(seq))
            else:
                self._scheduler.add(seq)

    def compile_again(self, seq: Sequence, state: Future[GrammarState]) -> None:
        """Take a sequence out of the batch until `state` is there. It is then queued as if preempted."""
        self._scheduler.remove(seq)
        self.compiling.add(seq, state)

    def take_compiled(self) -> None:
        """Queue the sequences whose grammars have been compiled, and end those whose have not."""
        for seq, error in self.compiling.take_done():
            if error is None:
                self._scheduler.add(seq)
            else:
                seq.finish(FinishReason.ERROR, str(error), error.code)
                self._ended_without_step.append(seq)

    def abort(self, seq_id: str) -> list[SeqOutput]:
        """Abort a request. Returns the last output of each of its sequences."""
        return [self._abort(seq) for seq in self.seqs_of(seq_id)]

    def end(self, seq: Sequence, *new: Any) -> list[SeqOutput]:
        """Remove a sequence that a step has finished. Returns its output, with what is `new` in it (the
        arguments of `Sequence.output`), after those of the other choices if it failed and ends them too.
        """
        self._scheduler.remove(seq)
        self._end_drafting(seq)
        return [*self._abort_others(seq), self._last_output(seq, *new)]

    def report_ended_without_step(self) -> list[SeqOutput]:
        """Remove the sequences that have ended without a step. Returns their outputs."""
        outputs: list[SeqOutput] = []
        while self._ended_without_step:
            seq = self._ended_without_step.pop(0)
            outputs += [*self._abort_others(seq), self._last_output(seq, [])]
        return outputs

    def check_integrity(self) -> None:
        """Raise EngineError unless every sequence is in exactly one place."""
        scheduler = self._scheduler
        places = [*scheduler.running, *scheduler.waiting, *self._ended_without_step, *self.compiling]
        seqs = [seq for seqs in self._seqs.values() for seq in seqs]
        if sorted(map(id, places)) != sorted(map(id, seqs)):
            raise EngineError("a sequence is in no queue, or in two")
        if stray := [seq.seq_id for seq in places if seq.block_table and seq not in scheduler.running]:
            raise EngineError(f"sequences {stray} hold blocks, but are not running")

    def _abort(self, seq: Sequence) -> SeqOutput:
        if seq in self._ended_without_step:
            self._ended_without_step.remove(seq)
        elif not self.compiling.remove(seq):
            self._scheduler.remove(seq)
        seq.finish(FinishReason.ABORT)
        self._end_drafting(seq)
        return self._last_output(seq, [])

    def _abort_others(self, seq: Sequence) -> list[SeqOutput]:
        """Abort the other choices of the request of `seq`, which has finished, if it failed."""
        if seq.finish_reason is not FinishReason.ERROR:
            return []
        return [self._abort(other) for other in self.seqs_of(seq.seq_id) if other is not seq]

    def _last_output(self, seq: Sequence, *new: Any) -> SeqOutput:
        seqs = self._seqs[seq.seq_id]
        seqs.remove(seq)
        if not seqs:
            del self._seqs[seq.seq_id]
        return seq.output(*new, others_run=bool(seqs))
