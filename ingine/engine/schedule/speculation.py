"""How many tokens to draft for each sequence, so that speculation pays and never costs much.

A step that computes k drafted tokens besides the next one of a sequence samples at all k + 1 positions, and
keeps what is sampled up to the first that is not as drafted. A token depends on logits, parameters, seed and
position alone, so the output is token for token the one without speculation, greedy or random: there is
nothing to correct for, as in rejection sampling (Leviathan et al. 2023).

What a drafted token is worth: the probability that it and all before it are right, as the drafter estimates.
What it costs: measured, since a row more is nearly free where a step waits for weights, and dear where it
waits for arithmetic.
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
"""Of the latest steps, to tell their cost: the least of the plain ones, since a busy machine only ever adds;
the median of drafted ones."""

REFRESH_INTERVAL = 32
"""Steps after which a plain one is due: contexts grow, and with them what a step costs without drafts."""

PROBE_INTERVAL = 256
"""Steps without drafts after which their cost is measured anew, in case that it was a bad moment."""

PROBE_RATE = 0.5
"""Acceptance rate from which on a sequence may serve to measure that, with a single token."""

MARGIN = 1.2
"""By how much a drafted token has to bring more than it costs: both are estimates."""

MIN_RATE = 0.05
"""What is accepted less often is not drafted, however cheap it seems."""


@dataclass(slots=True)
class StepCost:
    """What was measured of decode steps of about one batch size."""

    plain_s: deque[float] = field(default_factory=lambda: deque(maxlen=NUM_READINGS))
    """Seconds of steps without drafts."""
    per_draft_token_s: deque[float] = field(default_factory=lambda: deque(maxlen=NUM_READINGS))
    plain_at: int = 0
    drafted_at: int = 0
    """Number of the last step without drafts, and with."""


class Speculator:
    """Drafts for pure decode steps. `observe` has to be told what each decode step took."""

    def __init__(self, num_speculative_tokens: int, outputs: OutputHistory | None = None):
        """outputs: what to draft by suffix from, besides the sequence itself. None: by prompt lookup."""
        self._num_speculative_tokens = num_speculative_tokens
        self._outputs = outputs
        self._costs: dict[int, StepCost] = {}
        self._num_steps = 0

    @classmethod
    def of(cls, config: EngineConfig) -> "Speculator | None":
        """None: `config` asks for no speculation."""
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
        """Later sequences of the same tenant may draft from the output of this one, which has ended."""
        if self._outputs is not None and seq.finish_reason is not FinishReason.ERROR:
            self._outputs.add(seq.tenant, seq.token_ids[seq.num_prompt_tokens :])

    def draft(self, seqs: list[Sequence], max_num_tokens: int) -> list[list[int]]:
        """Tokens that may follow each of `seqs`, at most `max_num_tokens` in all. All of them decode."""
        for seq in seqs:
            if seq.drafter is not None:
                seq.drafter.catch_up()
        min_probability, longest = self._limits(len(seqs))
        drafts = []
        for seq in seqs:
            if seq.drafter is None:
                drafts.append([])
                continue
            # The last of the tokens that a sequence may have needs no draft: it is sampled after all others.
            room = min(longest, max_num_tokens, seq.max_num_tokens - seq.num_tokens - 1)
            drafts.append(seq.drafter.draft(room, min_probability))
            max_num_tokens -= len(drafts[-1])
        return drafts

    def observe(self, num_seqs: int, num_draft_tokens: int, seconds: float) -> None:
        """A decode step of `num_seqs` sequences took `seconds`."""
        self._num_steps += 1
        cost = self._cost(num_seqs)
        if num_draft_tokens:
            if not cost.plain_s:
                return  # nothing to tell the drafts' share by
            if self._num_steps - cost.drafted_at > PROBE_INTERVAL:
                cost.per_draft_token_s.clear()
            cost.per_draft_token_s.append((seconds - min(cost.plain_s)) / num_draft_tokens)
            cost.drafted_at = self._num_steps
        else:
            cost.plain_s.append(seconds)
            cost.plain_at = self._num_steps

    def _limits(self, num_seqs: int) -> tuple[float, int]:
        """The probability from which on a drafted token pays, and the longest draft."""
        cost = self._cost(num_seqs)
        if len(cost.plain_s) < NUM_READINGS or self._num_steps - cost.plain_at >= REFRESH_INTERVAL:
            return 1.0, 0
        if not cost.per_draft_token_s or self._num_steps - cost.drafted_at >= PROBE_INTERVAL:
            return PROBE_RATE, 1
        # A step yields num_seqs tokens in plain_s. Another row has to yield as many in its own time.
        break_even = median(cost.per_draft_token_s) * num_seqs / min(cost.plain_s)
        return max(MARGIN * break_even, MIN_RATE), self._num_speculative_tokens

    def _cost(self, num_seqs: int) -> StepCost:
        """Of this batch size and those within a tenth of it."""
        return self._costs.setdefault(round(4 * math.log2(num_seqs)), StepCost())
