"""A loop of continuous batching over llama.cpp's batches, which the library lacks.

Each step takes a token of every running sequence, then prompts in order of arrival up to `n_batch` tokens.
Greedy sampling is an argmax over all rows of logits at once.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import llama_cpp
import numpy as np

from benchmarks.rivals.protocol import Request

MIN_SHARED_TOKENS = 64
"""Minimum length of a prefix for which a request waits until another sequence has computed it."""


@dataclass
class Slot:
    """A request, and its sequence in llama.cpp's KV cache."""

    seq_id: int
    index: int
    request: Request
    tokens: list[int]
    """Prompt and output."""
    num_computed: int = 0

    @property
    def num_uncomputed(self) -> int:
        return len(self.tokens) - self.num_computed


class LlamaSteps:
    """A `StepEngine` on a `llama_context` whose sequences are all free."""

    def __init__(self, context: Any, *, num_vocab: int, num_seqs: int, n_batch: int):
        self._context, self._num_vocab, self._n_batch = context, num_vocab, n_batch
        self._memory = llama_cpp.llama_get_memory(context)
        llama_cpp.llama_memory_clear(self._memory, False)
        self._batch = llama_cpp.llama_batch_init(n_batch, 0, 1)
        self._free = deque(range(num_seqs))
        self._waiting: deque[tuple[int, Request]] = deque()
        self._running: list[Slot] = []

    def __del__(self):
        llama_cpp.llama_batch_free(self._batch)

    def add(self, index: int, request: Request) -> None:
        self._waiting.append((index, request))

    def step(self) -> Iterator[tuple[int, list[int]]]:
        self._admit()
        caught_up = self._decode(self._schedule())
        for slot, token_id in zip(caught_up, self._argmax(len(caught_up)), strict=True):
            slot.tokens.append(token_id)
            if len(slot.tokens) == len(slot.request.prompt) + slot.request.num_tokens:
                self._running.remove(slot)
                llama_cpp.llama_memory_seq_rm(self._memory, slot.seq_id, -1, -1)
                self._free.append(slot.seq_id)
            yield slot.index, [token_id]

    def _admit(self) -> None:
        while self._waiting and self._free:
            index, request = self._waiting[0]
            slot = Slot(self._free[0], index, request, list(request.prompt))
            source, length = self._longest_prefix(request.prompt)
            if length >= MIN_SHARED_TOKENS:
                if source.num_computed < length:
                    return  # in a step or two the prefix can be shared
                # Parts of the cache can only copy whole sequences; the differing rest is cut off.
                llama_cpp.llama_memory_seq_cp(self._memory, source.seq_id, slot.seq_id, -1, -1)
                llama_cpp.llama_memory_seq_rm(self._memory, slot.seq_id, length, -1)
                slot.num_computed = length
            self._waiting.popleft()
            self._free.popleft()
            self._running.append(slot)

    def _longest_prefix(self, prompt: Sequence[int]) -> tuple[Slot | None, int]:
        """The running slot with the longest prefix of `prompt`, and its length, which is less than all of
        `prompt`."""
        lengths = [(_num_equal(slot.tokens, prompt[:-1]), slot) for slot in self._running]
        length, slot = max(lengths, key=lambda item: item[0], default=(0, None))
        return slot, length

    def _schedule(self) -> list[tuple[Slot, int]]:
        budget, work = self._n_batch, []
        for slot in sorted(self._running, key=lambda slot: slot.num_uncomputed > 1):
            if num_tokens := min(budget, slot.num_uncomputed):
                work.append((slot, num_tokens))
                budget -= num_tokens
        return work

    def _decode(self, work: Sequence[tuple[Slot, int]]) -> list[Slot]:
        """Compute. Returns the slots that have logits now, in order of their rows. Raises RuntimeError."""
        batch, row, caught_up = self._batch, 0, []
        for slot, num_tokens in work:
            for position in range(slot.num_computed, slot.num_computed + num_tokens):
                batch.token[row] = slot.tokens[position]
                batch.pos[row] = position
                batch.n_seq_id[row] = 1
                batch.seq_id[row][0] = slot.seq_id
                batch.logits[row] = position == len(slot.tokens) - 1
                row += 1
            if num_tokens == slot.num_uncomputed:
                caught_up.append(slot)
            slot.num_computed += num_tokens
        batch.n_tokens = row
        if code := llama_cpp.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode returned {code} for a batch of {row} tokens")
        return caught_up

    def _argmax(self, num_rows: int) -> list[int]:
        if num_rows == 0:
            return []
        logits = llama_cpp.llama_get_logits(self._context)
        return np.ctypeslib.as_array(logits, shape=(num_rows, self._num_vocab)).argmax(axis=1).tolist()


def _num_equal(first: Sequence[int], second: Sequence[int]) -> int:
    """The length of the common prefix."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))
