"""Chooses which tokens of which sequences the next step computes.

There are no phases. The scheduler lets each sequence's `num_computed_tokens` catch up with its `num_tokens`,
within one token budget for each step. A decode is a sequence that is one token behind, a prefill one that is
many tokens behind, and a long prefill is split where the budget ends (chunked prefill). A preempted or
resumed sequence is simply far behind again. With speculation a sequence may also be ahead: the rest of the
budget, and free memory that no sequence needs yet, go to draft tokens.

A step may be scheduled while the previous one is in flight: `advance` counts the tokens of a launched step,
and `settle` confirms that they are computed. In between, a sequence that has caught up has a pending token:
one that is certain to come, but whose id is not known yet. The sequence is scheduled as if it had the token.

Sequences are ordered by a key that never changes, lower first: arrival_time + priority * priority_ageing_s.
The key is static and still implements ageing: a sequence of priority 1 precedes every sequence of priority 0
that arrives more than `priority_ageing_s` after it, so no stream of more urgent sequences can starve it.
"""

from bisect import bisect_left, insort
from collections import deque
from dataclasses import dataclass, field
from operator import attrgetter

from ingine.engine.schedule.block_manager import BlockManager
from ingine.engine.schedule.sequence import Sequence
from ingine.engine.schedule.speculation import Speculator

MAX_FORCED_DRAFT = 16
"""Forced tokens of one sequence that one step computes. Each saves a step, and takes the time of a prefilled
token from the other sequences of this one."""

_sort_key = attrgetter("sort_key")


@dataclass(slots=True)
class ScheduledBatch:
    """The work of one step: `seqs[i]` computes its next `num_tokens[i]` tokens, then those of `drafts[i]`."""

    seqs: list[Sequence] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)
    drafts: list[list[int]] = field(default_factory=list)
    forced: set[Sequence] = field(default_factory=set)
    """The sequences whose drafts their grammars force. The drafts of the others are guesses."""
    admitted: list[Sequence] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)
    num_computed: list[int] = field(default_factory=list)
    """For each sequence, the number of its tokens that are computed with this batch, without drafts. Set when
    the batch is launched."""
    caught_up: list[Sequence] = field(default_factory=list)
    """The sequences for which this batch samples a token. Set when the batch is launched."""

    def add(self, seq: Sequence, num_tokens: int) -> None:
        self.seqs.append(seq)
        self.num_tokens.append(num_tokens)
        self.drafts.append([])

    @property
    def is_decode(self) -> bool:
        """Whether every sequence computes exactly one token, not counting drafts."""
        return 0 < len(self.seqs) == sum(self.num_tokens)

    @property
    def num_draft_tokens(self) -> int:
        return sum(map(len, self.drafts))

    @property
    def num_guessed_tokens(self) -> int:
        """The draft tokens that speculation has guessed."""
        guesses = (draft for seq, draft in zip(self.seqs, self.drafts, strict=True) if seq not in self.forced)
        return sum(map(len, guesses))


class Scheduler:
    """Keeps the queues `waiting` and `running`, both ordered by key, and makes a batch of them.

    Every sequence makes progress in the end: preemption always takes the running sequence with the largest
    key, so the most urgent one keeps its blocks and advances in every step until it finishes. It fits when it
    runs alone, because its length was validated.
    """

    def __init__(
        self,
        block_manager: BlockManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        speculator: Speculator | None = None,
        max_forced_draft: int = MAX_FORCED_DRAFT,
    ):
        """max_forced_draft: the most tokens that are drafted for a sequence because its grammar forces them;
        0 where steps are scheduled ahead, since what is forced follows from the last token.
        """
        self.block_manager = block_manager
        self._speculator = speculator
        self.max_forced_draft = max_forced_draft
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self.prefix_cache_query_tokens = 0
        self.prefix_cache_hit_tokens = 0

    def add(self, seq: Sequence) -> None:
        insort(self.waiting, seq, key=_sort_key)

    def schedule(self) -> ScheduledBatch:
        """Choose the next step's tokens and allocate their blocks. Running sequences precede waiting ones."""
        batch = ScheduledBatch()
        budget = self._schedule_running(batch)
        if not batch.preempted:  # else memory is short, and a newly admitted sequence would be preempted next
            self._admit_waiting(batch, budget)
        if self._speculator is not None or (
            self.max_forced_draft and any(seq.grammar is not None for seq in batch.seqs)
        ):
            self._add_drafts(batch)
        return batch

    def schedule_alone(self, seq_id: str) -> ScheduledBatch:
        """Schedule one request's running sequences alone. Sequences after them may be preempted for their
        blocks.
        """
        batch, budget = ScheduledBatch(), self.max_num_batched_tokens
        behind = deque(self.running)
        while behind:
            seq = behind.popleft()
            if seq.seq_id != seq_id:
                continue
            num_after = sum(other.seq_id == seq_id for other in behind)
            num_tokens = min(seq.num_uncomputed_tokens, budget - num_after)
            if self._allocate(seq, num_tokens, behind, batch):
                batch.add(seq, num_tokens)
                budget -= num_tokens
        return batch

    def advance(self, batch: ScheduledBatch) -> None:
        """Count a batch that has been launched. Without this call the next `schedule` repeats the batch."""
        for seq, num_tokens in zip(batch.seqs, batch.num_tokens, strict=True):
            if not seq.block_table:  # it has ended or was removed since: see `settle`
                batch.num_computed.append(seq.num_computed_tokens + 1)
                continue
            seq.num_computed_tokens += num_tokens
            batch.num_computed.append(seq.num_computed_tokens)
            if seq.num_uncomputed_tokens == 0:
                seq.num_pending_tokens += 1
                batch.caught_up.append(seq)

    def settle(self, batch: ScheduledBatch) -> None:
        """Count a batch as computed, just before its tokens are appended.

        Draft tokens do not count yet, see `accept`.
        """
        for seq, num_tokens in zip(batch.seqs, batch.num_computed, strict=True):
            if seq.num_computed_tokens >= num_tokens:  # it was not preempted, nor did it end, meanwhile
                self.block_manager.cache_full_blocks(seq, num_tokens)
        for seq in batch.caught_up:
            seq.num_pending_tokens -= 1

    def accept(self, seq: Sequence) -> None:
        """Count the draft tokens that `seq` has accepted as computed. Only its last token, which was sampled
        after them, is not.
        """
        seq.num_computed_tokens = seq.num_tokens - 1
        self.block_manager.cache_full_blocks(seq, seq.num_computed_tokens)

    def start_over_without_drafts(self, seq: Sequence) -> None:
        """Recompute all of `seq` in other blocks, without speculation, after logits that are not finite.

        A draft may be the cause: attention multiplies by 0 what a token does not attend to, and 0 times
        infinity is NaN.
        """
        self.block_manager.uncache(seq)
        seq.drafter = None
        seq.takes_forced_drafts = False
        self._preempt(seq)

    def remove(self, seq: Sequence) -> None:
        """Remove a sequence from its queue, and free its blocks."""
        if not _remove_from(self.running, seq):
            _remove_from(self.waiting, seq)
        self.block_manager.free(seq)

    def _schedule_running(self, batch: ScheduledBatch) -> int:
        """Add the running sequences to the batch. Returns the rest of the token budget."""
        budget = self.max_num_batched_tokens
        queue = deque(self.running)
        while queue:
            seq = queue.popleft()
            if seq.is_at_limit:
                continue
            # A long prefill leaves one token for each running sequence after it, so that decodes continue.
            num_tokens = min(seq.num_uncomputed_tokens, budget - len(queue))
            if self._allocate(seq, num_tokens, queue, batch):
                batch.add(seq, num_tokens)
                budget -= num_tokens
        return budget

    def _allocate(
        self, seq: Sequence, num_tokens: int, queue: deque[Sequence], batch: ScheduledBatch
    ) -> bool:
        """Allocate blocks for `seq`, if need be by preempting sequences of `queue`, the last first. Returns
        False if `seq` itself was preempted.
        """
        while not self.block_manager.allocate(seq, seq.num_computed_tokens + num_tokens):
            victim = queue.pop() if queue else seq
            self._preempt(victim)
            batch.preempted.append(victim)
            if victim is seq:
                return False
        return True

    def _preempt(self, seq: Sequence) -> None:
        """Free all blocks of `seq`, and move it to `waiting` with its old key. It later recomputes the tokens
        that the prefix cache has lost by then.
        """
        _remove_from(self.running, seq)
        self.block_manager.free(seq)
        self.num_preemptions += 1
        self.add(seq)

    def _admit_waiting(self, batch: ScheduledBatch, budget: int) -> None:
        """Admit sequences for which there are free blocks for all of their tokens, and one block more.

        The margin lets the running sequences decode for a while before the new one has to be preempted. A
        choice that waits for its request's prompt is passed over, and holds up no sequence behind it.
        """
        if not self.waiting:
            return
        num_promised = sum(self._num_promised_blocks(seq) for seq in self.running)
        # A sequence that ends with its pending token still has blocks, but takes part in no further step.
        num_places = self.max_num_seqs - sum(not seq.is_at_limit for seq in self.running)
        index = 0
        while index < len(self.waiting) and budget and num_places > 0:
            seq = self.waiting[index]
            if seq.group is not None and seq.group.awaits_prompt:
                index += 1
                continue
            # Only tokens that are computed have log probabilities.
            prefix = [] if seq.needs_prompt_logprobs else self.block_manager.find_prefix(seq)
            if self._num_needed_blocks(seq, prefix) + num_promised > self.block_manager.num_free_blocks:
                break  # no later one is admitted: it would take the memory that this one waits for
            del self.waiting[index]
            self.block_manager.share_prefix(seq, prefix)
            self._count_prefix(seq)
            if seq.group is not None:
                seq.group.admit(seq)
            num_tokens = min(seq.num_uncomputed_tokens, budget)
            self.block_manager.allocate(seq, seq.num_computed_tokens + num_tokens)
            insort(self.running, seq, key=_sort_key)
            num_places -= 1
            num_promised += self._num_promised_blocks(seq)
            batch.add(seq, num_tokens)
            batch.admitted.append(seq)
            budget -= num_tokens

    def _add_drafts(self, batch: ScheduledBatch) -> None:
        """Add draft tokens to a batch in which every sequence decodes. Beside a prefill they would delay its
        first token.

        No sequence is preempted for a draft, neither now nor in the next step for lack of a block that the
        draft took.
        """
        if not batch.is_decode or any(seq.num_uncomputed_tokens != 1 for seq in batch.seqs):
            return
        budget = self.max_num_batched_tokens - len(batch.seqs)
        blocks = self.block_manager
        for index, (draft, is_forced) in enumerate(self._draft(batch.seqs, budget)):
            seq = batch.seqs[index]
            num_tokens = seq.num_tokens + len(draft)
            num_missing = blocks.num_missing_blocks(seq, num_tokens)
            if num_missing and blocks.num_free_blocks - num_missing < len(self.running):
                continue
            blocks.allocate(seq, num_tokens)
            batch.drafts[index] = draft
            if is_forced:
                batch.forced.add(seq)

    def _draft(self, seqs: list[Sequence], budget: int) -> list[tuple[list[int], bool]]:
        """Tokens that may follow each of `seqs`, at most `budget` in all: those that a grammar forces, which
        cannot be wrong, else those that the speculator guesses; and which of the two.
        """
        forced: list[list[int]] = []
        for seq in seqs:
            room = min(self.max_forced_draft, budget, seq.max_num_tokens - seq.num_tokens - 1)
            draft = []
            if seq.grammar is not None and seq.takes_forced_drafts and room > 0:
                draft = seq.grammar.forced_tokens()[:room]
            forced.append(draft)
            budget -= len(draft)
        if self._speculator is None:
            return [(draft, True) for draft in forced]
        guessed = self._speculator.draft(seqs, budget)
        for seq, draft in zip(seqs, guessed, strict=True):
            if seq.grammar is not None:
                del draft[seq.grammar.num_allowed(draft) :]
        return [(sure or guess, bool(sure)) for sure, guess in zip(forced, guessed, strict=True)]

    def _num_promised_blocks(self, seq: Sequence) -> int:
        """The blocks that are kept free for a running sequence."""
        return self.block_manager.num_missing_blocks(seq, seq.num_tokens + seq.num_pending_tokens) + 1

    def _num_needed_blocks(self, seq: Sequence, prefix: list[int]) -> int:
        """The free blocks that `seq` takes if it begins with the cached blocks `prefix`."""
        blocks = self.block_manager
        return blocks.num_missing_blocks(seq, seq.num_tokens) - len(prefix) + blocks.num_free_in(prefix)

    def _count_prefix(self, seq: Sequence) -> None:
        self.prefix_cache_query_tokens += seq.num_tokens
        self.prefix_cache_hit_tokens += seq.num_computed_tokens
        if seq.num_cached_tokens is None:
            seq.num_cached_tokens = seq.num_computed_tokens


def _remove_from(queue: list[Sequence], seq: Sequence) -> bool:
    """Remove `seq` from a queue that is ordered by unique keys. Returns False if it is not there."""
    index = bisect_left(queue, seq.sort_key, key=_sort_key)
    if index == len(queue) or queue[index] is not seq:
        return False
    del queue[index]
    return True
