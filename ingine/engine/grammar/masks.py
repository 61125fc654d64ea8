"""The masks of one step, filled while the model runs."""

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from llguidance import LLExecutor

from ingine.engine.grammar.state import GrammarState

MAX_THREADS = 8


@dataclass(frozen=True, slots=True)
class ConstrainedRows:
    """Rows of logits of one sequence: `first` follows its tokens, each later one a token more of the
    draft."""

    first: int
    state: GrammarState
    draft: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class StepMasks:
    """rows: [num_masks] int64, the row of logits of each mask. masks: [num_masks, num_words] int32; one that
    is 0 everywhere belongs to a row that has no next token: `GrammarState.error` says why, once it is
    there."""

    rows: np.ndarray
    masks: np.ndarray


class MaskFiller:
    """Fills masks in a thread of its own, several rows in parallel. The states are its own until they are
    filled."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="masks")
        num_threads = max(1, min(MAX_THREADS, (os.cpu_count() or 1) // 2))
        self._executor = LLExecutor(num_threads=num_threads)

    def start(self, constrained: Sequence[ConstrainedRows]) -> Future[StepMasks]:
        return self._thread.submit(self.fill, constrained)

    def fill(self, constrained: Sequence[ConstrainedRows]) -> StepMasks:
        """constrained: at least one, each of another state."""
        rows = [one.first + index for one in constrained for index in range(len(one.draft) + 1)]
        num_words = constrained[0].state.num_words
        masks = np.empty((len(rows), num_words), dtype=np.int32)
        starts = np.cumsum([0, *(len(one.draft) + 1 for one in constrained)]).tolist()
        self._fill_first(constrained, starts, masks)
        for one, start in zip(constrained, starts, strict=False):
            if one.draft:
                _fill_draft(one, masks[start + 1 :])
        return StepMasks(np.array(rows, dtype=np.int64), masks)

    def close(self) -> None:
        self._thread.shutdown()

    def _fill_first(
        self, constrained: Sequence[ConstrainedRows], starts: list[int], masks: np.ndarray
    ) -> None:
        places = list(zip(constrained, starts, strict=False))
        matchers = [(one.state.matcher, at) for one, at in places if one.state.matcher is not None]
        if matchers:
            self._executor.unsafe_compute_mask_ptr(
                matchers, masks.ctypes.data, masks.shape[1] * 4, len(masks)
            )
        for one, at in places:
            if not one.state.complete(masks[at]):
                masks[at] = 0


def _fill_draft(one: ConstrainedRows, masks: np.ndarray) -> None:
    """The masks after each token of the draft. From one that the grammar forbids on there is no next
    token."""
    ahead = one.state.ahead()
    for index, token_id in enumerate(one.draft):
        if token_id in ahead.end_token_ids or not (ahead.accept([token_id]) and ahead.fill(masks[index])):
            masks[index : len(one.draft)] = 0
            return
