"""Decides how many tokens to draft for each sequence, so that speculation pays and never costs much.

A step that computes k draft tokens besides the next one of a sequence samples at all k + 1 positions, and
keeps the sampled tokens up to and including the first that differs from the draft. A token depends only on
logits, parameters, seed and position, so the output is token for token the one without speculation, greedy
or random. No correction such as rejection sampling (Leviathan et al. 2023) is needed.

A draft token is worth the probability that it and all before it are right, which the drafter estimates. Its
cost is measured: another row is nearly free where a step is bound by memory bandwidth, and expensive where
it is bound by arithmetic.
"""

import math
from collections import deque
from dataclasses import dataclass, field
from statistics import median

from ingine.engine.config import EngineConfig
from ingine.engine.outputs import FinishReason
from ingine.engine.schedule.drafter import Drafter
from ingine.engine.schedule.output_history import OutputHistory
from ingine.engine.schedule.sequence import Sequence
from ingine.engine.schedule.suffix_drafter import SuffixDrafter

NUM_READINGS = 5
"""How many of the latest steps the cost is estimated from: the minimum of steps without drafts, since other
load on the machine only adds time, and the median of steps with drafts."""

REFRESH_INTERVAL = 32
"""Steps after which one without drafts is due: contexts grow, and with them the cost of a step."""

PROBE_INTERVAL = 256
"""Steps without drafts after which the cost of drafts is measured again, in case the last measurement was
taken at a bad moment."""

PROBE_RATE = 0.5
"""The lowest acceptance rate at which a sequence drafts a single token for that measurement."""

MARGIN = 1.2
"""The factor by which a draft token's worth has to exceed its cost, since both are estimates."""

MIN_RATE = 0.05
"""The lowest probability at which a token is drafted, however cheap it seems."""


@dataclass(slots=True)
class StepCost:
    """Measurements of decode steps of about one batch size."""

    plain_s: deque[float] = field(default_factory=lambda: deque(maxlen=NUM_READINGS))
    """Seconds of the latest steps without drafts."""
    per_draft_token_s: deque[float] = field(default_factory=lambda: deque(maxlen=NUM_READINGS))
    plain_at: int = 0
    drafted_at: int = 0
    """The numbers of the last step without drafts and of the last one with drafts."""


class Speculator:
    """Drafts tokens for pure decode steps. Every decode step has to be reported to `observe`."""

    def __init__(self, num_speculative_tokens: int, outputs: OutputHistory | None = None):
        """outputs: the recent outputs from which suffix speculation drafts, besides the sequence itself. None
        selects prompt lookup.
        """
        self._num_speculative_tokens = num_speculative_tokens
        self._outputs = outputs
        self._costs: dict[int, StepCost] = {}
        self._num_steps = 0

    @classmethod
    def of(cls, config: EngineConfig) -> "Speculator | None":
        """The speculator that `config` selects, or None if it selects no speculation."""
        if config.speculation is None:
            return None
        outputs = None
        if config.speculation == "suffix":
            outputs = OutputHistory(
                config.suffix_decoding_max_cached_tokens,
                across_tenants=config.suffix_decoding_across_tenants,
            )
        return cls(config.num_speculative_tokens, outputs)

    def begin(self, seq: Sequence) -> None:
        """Give a new sequence its drafter."""
        if self._outputs is None:
            seq.drafter = Drafter(seq.token_ids)
        else:
            seq.drafter = SuffixDrafter(seq.token_ids, seq.tenant, self._outputs)

    def end(self, seq: Sequence) -> None:
        """Let later sequences of the same tenant draft from the output of this one, which has ended."""
        if self._outputs is not None and seq.finish_reason is not FinishReason.ERROR:
            self._outputs.add(seq.tenant, seq.token_ids[seq.num_prompt_tokens :])

    def draft(self, seqs: list[Sequence], max_num_tokens: int) -> list[list[int]]:
        """Return draft tokens for each of `seqs`, at most `max_num_tokens` in all. All of `seqs` decode."""
        for seq in seqs:
            if seq.drafter is not None:
                seq.drafter.catch_up()
        min_probability, longest = self._limits(len(seqs))
        drafts = []
        for seq in seqs:
            if seq.drafter is None:
                drafts.append([])
                continue
            # The last token of a sequence is sampled after all others, so it needs no draft.
            room = min(longest, max_num_tokens, seq.max_num_tokens - seq.num_tokens - 1)
            drafts.append(seq.drafter.draft(room, min_probability))
            max_num_tokens -= len(drafts[-1])
        return drafts

    def observe(self, num_seqs: int, num_draft_tokens: int, seconds: float) -> None:
        """Record that a decode step of `num_seqs` sequences took `seconds`."""
        self._num_steps += 1
        cost = self._cost(num_seqs)
        if num_draft_tokens:
            if not cost.plain_s:
                return  # no step without drafts to compare with
            if self._num_steps - cost.drafted_at > PROBE_INTERVAL:
                cost.per_draft_token_s.clear()
            cost.per_draft_token_s.append((seconds - min(cost.plain_s)) / num_draft_tokens)
            cost.drafted_at = self._num_steps
        else:
            cost.plain_s.append(seconds)
            cost.plain_at = self._num_steps

    def _limits(self, num_seqs: int) -> tuple[float, int]:
        """The lowest probability at which a draft token pays, and the longest draft."""
        cost = self._cost(num_seqs)
        if len(cost.plain_s) < NUM_READINGS or self._num_steps - cost.plain_at >= REFRESH_INTERVAL:
            return 1.0, 0
        if not cost.per_draft_token_s or self._num_steps - cost.drafted_at >= PROBE_INTERVAL:
            return PROBE_RATE, 1
        # A step yields num_seqs tokens in plain_s. Another row has to yield tokens at least at that rate.
        break_even = median(cost.per_draft_token_s) * num_seqs / min(cost.plain_s)
        return max(MARGIN * break_even, MIN_RATE), self._num_speculative_tokens

    def _cost(self, num_seqs: int) -> StepCost:
        """The measurements for this batch size and those within a tenth of it."""
        return self._costs.setdefault(round(4 * math.log2(num_seqs)), StepCost())
