"""Which tokens of which sequences the next step computes.

There are no phases. Each sequence's `num_computed_tokens` chases its `num_tokens`, under one budget of
tokens a step: a decode is a sequence that is one token behind, a prefill one that is many behind, and a
long prefill is cut where the budget ends (chunked prefill). A preempted or resumed sequence is simply far
behind again. With speculation a sequence may be ahead as well: what is left of the budget, and of memory
that nobody needs yet, goes to tokens that are only guessed.

A step may be scheduled while the one before is on its way: `advance` counts what was launched, `settle` says
that it is there. In between a sequence that has caught up has a token pending, which is known to come and
not which it is; it is scheduled as if it were there.

Order is by a key that never changes, lower first: arrival_time + priority * priority_ageing_s. Because it is
static it ages for free: a sequence of priority 1 goes before every one of priority 0 that came more than
`priority_ageing_s` after it, so nothing waits forever behind a stream of better priority.
"""

from bisect import bisect_left, insort
from collections import deque
from dataclasses import dataclass, field
from operator import attrgetter

from ingine.engine.schedule.block_manager import BlockManager
from ingine.engine.schedule.sequence import Sequence
from ingine.engine.schedule.speculation import Speculator

_sort_key = attrgetter("sort_key")


@dataclass(slots=True)
class ScheduledBatch:
    """One step's work: sequence i computes its next `num_tokens[i]` tokens, then those of its draft."""

    seqs: list[Sequence] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)
    drafts: list[list[int]] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)
    num_computed: list[int] = field(default_factory=list)
    """Tokens that each sequence has computed with this batch, drafts aside: known once it is launched."""
    caught_up: list[Sequence] = field(default_factory=list)
    """Those that get a token out of it: likewise."""

    def add(self, seq: Sequence, num_tokens: int) -> None:
        self.seqs.append(seq)
        self.num_tokens.append(num_tokens)
        self.drafts.append([])

    @property
    def is_decode(self) -> bool:
        """Whether every sequence computes one token, drafts aside."""
        return 0 < len(self.seqs) == sum(self.num_tokens)

    @property
    def num_draft_tokens(self) -> int:
        return sum(map(len, self.drafts))


class Scheduler:
    """`waiting` and `running` are in the order of their keys.

    Nothing can hang: a victim of preemption always has the largest key of those running, so the most
    urgent one keeps its blocks and advances in every step until it finishes; alone, it fits, because its
    length was checked.
    """

    def __init__(
        self,
        block_manager: BlockManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        speculator: Speculator | None = None,
    ):
        self.block_manager = block_manager
        self._speculator = speculator
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
        """Choose, and give blocks to, the next step's tokens. Running sequences first, then waiting ones."""
        batch = ScheduledBatch()
        budget = self._schedule_running(batch)
        if not batch.preempted:  # else memory is short, and what comes in now would be the next victim
            self._admit_waiting(batch, budget)
        if self._speculator is not None:
            self._add_drafts(batch, self._speculator)
        return batch

    def schedule_alone(self, seq: Sequence) -> ScheduledBatch:
        """As `schedule`, for one sequence of those running. Those after it may lose their blocks to it."""
        batch = ScheduledBatch()
        num_tokens = min(seq.num_uncomputed_tokens, self.max_num_batched_tokens)
        behind = deque(self.running[self.running.index(seq) + 1 :])
        if self._allocate(seq, num_tokens, behind, batch):
            batch.add(seq, num_tokens)
        return batch

    def advance(self, batch: ScheduledBatch) -> None:
        """The batch is on its way. Without this call nothing of it counts, and the next repeats it."""
        for seq, num_tokens in zip(batch.seqs, batch.num_tokens, strict=True):
            seq.num_computed_tokens += num_tokens
            batch.num_computed.append(seq.num_computed_tokens)
            if seq.num_uncomputed_tokens == 0:
                seq.num_pending_tokens += 1
                batch.caught_up.append(seq)

    def settle(self, batch: ScheduledBatch) -> None:
        """The batch has been computed, and its tokens are about to be appended.

        Of drafts nothing counts yet: `accept` says what does.
        """
        for seq, num_tokens in zip(batch.seqs, batch.num_computed, strict=True):
            if seq.num_computed_tokens >= num_tokens:  # it has neither ended nor been preempted meanwhile
                self.block_manager.cache_full_blocks(seq, num_tokens)
        for seq in batch.caught_up:
            seq.num_pending_tokens -= 1

    def accept(self, seq: Sequence) -> None:
        """`seq` has taken tokens of its draft, and the one after: all but that one are computed."""
        seq.num_computed_tokens = seq.num_tokens - 1
        self.block_manager.cache_full_blocks(seq, seq.num_computed_tokens)

    def start_over_without_drafts(self, seq: Sequence) -> None:
        """`seq` has logits that are not finite, perhaps a draft's doing: attention multiplies by 0 what a
        token does not see, and 0 times infinity is NaN. So all of it is computed anew, in other blocks.
        """
        self.block_manager.uncache(seq)
        seq.drafter = None
        self._preempt(seq)

    def remove(self, seq: Sequence) -> None:
        """Forget a sequence, wherever it is, and free its blocks."""
        if not _take_out(self.running, seq):
            _take_out(self.waiting, seq)
        self.block_manager.free(seq)

    def _schedule_running(self, batch: ScheduledBatch) -> int:
        """Returns the rest of the budget."""
        budget = self.max_num_batched_tokens
        queue = deque(self.running)
        while queue:
            seq = queue.popleft()
            if seq.is_at_limit:
                continue
            # A long prefill leaves every running sequence behind it one token, so that decodes go on.
            num_tokens = min(seq.num_uncomputed_tokens, budget - len(queue))
            if self._allocate(seq, num_tokens, queue, batch):
                batch.add(seq, num_tokens)
                budget -= num_tokens
        return budget

    def _allocate(
        self, seq: Sequence, num_tokens: int, queue: deque[Sequence], batch: ScheduledBatch
    ) -> bool:
        """Blocks for `seq`, at the cost of those after it in the order. False if it had to go itself."""
        while not self.block_manager.allocate(seq, seq.num_computed_tokens + num_tokens):
            victim = queue.pop() if queue else seq
            self._preempt(victim)
            batch.preempted.append(victim)
            if victim is seq:
                return False
        return True

    def _preempt(self, seq: Sequence) -> None:
        """Take all its blocks. It waits with its old key, and recomputes what the cache loses till then."""
        _take_out(self.running, seq)
        self.block_manager.free(seq)
        self.num_preemptions += 1
        self.add(seq)

    def _admit_waiting(self, batch: ScheduledBatch, budget: int) -> None:
        """Who comes in is promised memory for all that it has, and one block more.

        The margin lets those running decode on for a while before the newcomer has to be preempted.
        """
        if not self.waiting:
            return
        num_promised = sum(self._num_promised_blocks(seq) for seq in self.running)
        # One that ends with the token which is pending has blocks still, and no part in a step any more.
        num_places = self.max_num_seqs - sum(not seq.is_at_limit for seq in self.running)
        while self.waiting and budget and num_places > 0:
            seq = self.waiting[0]
            prefix = self.block_manager.find_prefix(seq)
            if self._num_needed_blocks(seq, prefix) + num_promised > self.block_manager.num_free_blocks:
                break  # nobody overtakes: it would take the memory that the first one waits for
            del self.waiting[0]
            self.block_manager.share_prefix(seq, prefix)
            self._count_prefix(seq)
            num_tokens = min(seq.num_uncomputed_tokens, budget)
            self.block_manager.allocate(seq, seq.num_computed_tokens + num_tokens)
            insort(self.running, seq, key=_sort_key)
            num_places -= 1
            num_promised += self._num_promised_blocks(seq)
            batch.add(seq, num_tokens)
            batch.admitted.append(seq)
            budget -= num_tokens

    def _add_drafts(self, batch: ScheduledBatch, speculator: Speculator) -> None:
        """Only where all decode: beside a prefill they would keep it from its first token.

        Nobody is preempted for a draft, now or, for want of the block that it took, in the next step.
        """
        if not batch.is_decode or any(seq.num_uncomputed_tokens != 1 for seq in batch.seqs):
            return
        budget = self.max_num_batched_tokens - len(batch.seqs)
        blocks = self.block_manager
        for index, draft in enumerate(speculator.draft(batch.seqs, budget)):
            seq = batch.seqs[index]
            num_tokens = seq.num_tokens + len(draft)
            num_missing = blocks.num_missing_blocks(seq, num_tokens)
            if num_missing and blocks.num_free_blocks - num_missing < len(self.running):
                continue
            blocks.allocate(seq, num_tokens)
            batch.drafts[index] = draft

    def _num_promised_blocks(self, seq: Sequence) -> int:
        """Blocks that are kept free for one that runs."""
        return self.block_manager.num_missing_blocks(seq, seq.num_tokens + seq.num_pending_tokens) + 1

    def _num_needed_blocks(self, seq: Sequence, prefix: list[int]) -> int:
        """Free blocks that one takes which begins with the cached blocks `prefix`."""
        blocks = self.block_manager
        return blocks.num_missing_blocks(seq, seq.num_tokens) - len(prefix) + blocks.num_free_in(prefix)

    def _count_prefix(self, seq: Sequence) -> None:
        self.prefix_cache_query_tokens += seq.num_tokens
        self.prefix_cache_hit_tokens += seq.num_computed_tokens
        if seq.num_cached_tokens is None:
            seq.num_cached_tokens = seq.num_computed_tokens


def _take_out(queue: list[Sequence], seq: Sequence) -> bool:
    """Remove `seq` from a queue in the order of keys, no two of which are equal. False if it is not there."""
    index = bisect_left(queue, seq.sort_key, key=_sort_key)
    if index == len(queue) or queue[index] is not seq:
        return False
    del queue[index]
    return True
