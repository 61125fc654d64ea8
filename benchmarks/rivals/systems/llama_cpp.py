"""llama.cpp through the low-level API of llama-cpp-python: many sequences in one llama_batch.

Options: `gguf`, the file (see `gguf_files.py`), and fields of `llama_context_params`. The loop is ours,
since the library has none: each step takes a token of every running sequence, then prompts in order of
arrival as far as `n_batch` goes. Greedy is an argmax over all rows of logits at once.
"""

import ctypes
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import llama_cpp
import numpy as np

from benchmarks.rivals.protocol import Loaded, Request, serve
from benchmarks.rivals.stepping import Stepping
from benchmarks.rivals.systems.gguf_files import gguf_path

MIN_SHARED_TOKENS = 64
"""A prefix shorter than this is not worth waiting for the sequence that computes it."""


@dataclass
class Slot:
    """One sequence of llama.cpp's KV cache and the request that has it."""

    seq_id: int
    index: int
    request: Request
    num_computed: int = 0
    tokens: list[int] = field(default_factory=list)
    """Prompt and output."""


class LlamaSteps:
    def __init__(self, context: Any, num_vocab: int, params: Any, *, share_prefix: bool):
        self._context, self._num_vocab = context, num_vocab
        self._memory = llama_cpp.llama_get_memory(context)
        self._batch = llama_cpp.llama_batch_init(params.n_batch, 0, 1)
        self._n_batch = params.n_batch
        self._free = deque(range(params.n_seq_max))
        self._share_prefix = share_prefix
        self._waiting: deque[tuple[int, Request]] = deque()
        self._running: list[Slot] = []

    def add(self, index: int, request: Request) -> None:
        self._waiting.append((index, request))

    def step(self) -> Iterator[tuple[int, list[int]]]:
        self._admit()
        # Decodes first, then prompts: both in order of arrival.
        work: list[tuple[Slot, int]] = []
        budget = self._n_batch
        for slot in sorted(self._running, key=lambda slot: len(slot.tokens) - slot.num_computed > 1):
            num_tokens = min(budget, len(slot.tokens) - slot.num_computed)
            if num_tokens:
                work.append((slot, num_tokens))
                budget -= num_tokens
        caught_up = self._decode(work)
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
            slot = Slot(self._free[0], index, request, tokens=list(request.prompt))
            if self._share_prefix and (match := self._longest_prefix(request.prompt)):
                source, length = match
                if source.num_computed < length:
                    return  # in a step or two it is there to be shared
                llama_cpp.llama_memory_seq_cp(self._memory, source.seq_id, slot.seq_id, 0, length)
                slot.num_computed = length
            self._waiting.popleft()
            self._free.popleft()
            self._running.append(slot)

    def _longest_prefix(self, prompt: list[int]) -> tuple[Slot, int] | None:
        lengths = [(_num_equal(slot.tokens, prompt[:-1]), slot) for slot in self._running]
        length, slot = max(lengths, key=lambda item: item[0], default=(0, None))
        return (slot, length) if length >= MIN_SHARED_TOKENS else None

    def _decode(self, work: list[tuple[Slot, int]]) -> list[Slot]:
        """Compute; the slots that have logits now, in order of their rows. Raises RuntimeError."""
        batch, row, caught_up = self._batch, 0, []
        for slot, num_tokens in work:
            for position in range(slot.num_computed, slot.num_computed + num_tokens):
                is_last = position == len(slot.tokens) - 1
                batch.token[row] = slot.tokens[position]
                batch.pos[row] = position
                batch.n_seq_id[row] = 1
                batch.seq_id[row][0] = slot.seq_id
                batch.logits[row] = is_last
                row += 1
                if is_last:
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


def _num_equal(first: list[int], second: list[int]) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b),
        min(len(first), len(second)),
    )


def load(model: str, options: dict[str, Any]) -> Loaded:
    options = dict(options)
    path = gguf_path(options.pop("gguf"))
    share_prefix = options.pop("share_prefix", False)
    llama_cpp.llama_backend_init()
    llama_model = llama_cpp.llama_model_load_from_file(
        str(path).encode(), llama_cpp.llama_model_default_params()
    )
    params = llama_cpp.llama_context_default_params()
    for name, value in options.items():
        if not hasattr(params, name):
            raise ValueError(f"llama_context_params has no field {name}")
        setattr(params, name, value)
    context = llama_cpp.llama_init_from_model(llama_model, params)
    if not llama_model or not context:
        raise RuntimeError(f"llama.cpp cannot load {path}: see the log")
    num_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(llama_model))
    return Loaded(
        Stepping(LlamaSteps(context, num_vocab, params, share_prefix=share_prefix)),
        versions={"llama-cpp-python": version("llama-cpp-python")},
        settings={
            **options,
            "gguf": path.name,
            "gguf_bytes": path.stat().st_size,
            "share_prefix": share_prefix,
            "system_info": ctypes.string_at(llama_cpp.llama_print_system_info()).decode(),
        },
    )


if __name__ == "__main__":
    serve(load)
