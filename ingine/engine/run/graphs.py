"""Runs steps in which every sequence decodes one token as CUDA graphs.

A step of a small batch is hundreds of kernels of a few microseconds each. Enqueueing them one by one may take
longer than running them; a graph enqueues all of them at once. It repeats exactly what was captured,
including Python's numbers. So each bucket of batch sizes has a graph of its own, and all other inputs, such
as lengths, are in tensors at fixed addresses. A batch is padded to its bucket with sequences that have no
tokens.
"""

import logging
import time
from bisect import bisect_left
from collections.abc import Callable
from enum import StrEnum
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ingine.engine.communication.parallel import TensorParallel
from ingine.engine.communication.transfer import Staging, to_device
from ingine.engine.kernels.attention import AttentionMetadata, KVCache
from ingine.engine.kernels.sampling import cuda as device_sampling
from ingine.engine.models.interface import Model
from ingine.engine.run.step_inputs import StepInputs

logger = logging.getLogger(__name__)

Replay = Callable[[], None]
Capture = Callable[[Callable[[], None]], Replay]
"""Runs a function and returns a function that repeats its kernels on the current contents of its tensors."""


class Choice(StrEnum):
    """How a graph samples: GREEDY needs only logits, RANDOM also the numbers of `pack_params`."""

    GREEDY = "greedy"
    RANDOM = "random"


class DecodeGraphs:
    """The graphs of all buckets: one of the model, and one of sampling for each `Choice`.

    The constructor captures all of them, the largest bucket first: the others then fit into its memory.
    """

    def __init__(
        self,
        model: Model,
        kv_caches: list[KVCache],
        tokens: Tensor,
        *,
        max_num_seqs: int,
        max_blocks: int,
        capture: Capture,
        parallel: TensorParallel,
    ):
        """tokens: [at least max_num_seqs] int64: the graphs sample into it, and read the last step's tokens
        from it.

        max_blocks: the most KV blocks of one sequence.
        """
        self._model, self._kv_caches, self._parallel = model, kv_caches, parallel
        self._tokens = tokens
        self._hidden = torch.zeros(
            max_num_seqs, model.config.hidden_size, dtype=model.dtype, device=model.device
        )
        self._sizes = bucket_sizes(max_num_seqs)
        self._inputs: dict[int, _StaticInputs] = {}
        self._model_graphs: dict[int, Replay] = {}
        self._sampling_graphs: dict[tuple[int, Choice], Replay] = {}
        began = time.perf_counter()
        for size in reversed(self._sizes):
            inputs = self._inputs[size] = _StaticInputs(size, max_blocks, model.device)
            self._model_graphs[size] = capture(partial(self._run_model, inputs))
            for choice in Choice:
                self._sampling_graphs[size, choice] = capture(partial(self._sample, inputs, choice))
        seconds = time.perf_counter() - began
        logger.info("captured CUDA graphs of %d batch sizes in %.1f s", len(self._sizes), seconds)

    def cover(self, inputs: StepInputs) -> bool:
        """Return whether a graph can run the step: it only returns the hidden states after which a token is
        sampled.
        """
        is_scored = inputs.scored_rows is not None
        return inputs.is_decode and not is_scored and len(inputs.query_lens) <= self._sizes[-1]

    def run_model(self, inputs: StepInputs) -> Tensor:
        """Enqueue the model on a step that the graphs `cover`. Returns the final hidden states [num_seqs,
        hidden_size], a view that is valid until the next call.
        """
        num_seqs = len(inputs.query_lens)
        size = self._size_for(num_seqs)
        self._inputs[size].fill(inputs)
        self._model_graphs[size]()
        return self._hidden[:num_seqs]

    def sample(self, num_seqs: int, choice: Choice, rows: np.ndarray | None) -> Tensor:
        """Enqueue sampling from the hidden states of the last `run_model`. Returns the tokens [num_seqs], a
        view that is valid until the next call.

        rows: from `device_sampling.pack_params`, for Choice.RANDOM on rank 0.
        """
        size = self._size_for(num_seqs)
        if rows is not None:
            self._inputs[size].fill_rows(rows)
        self._sampling_graphs[size, choice]()
        return self._tokens[:num_seqs]

    def _size_for(self, num_seqs: int) -> int:
        return self._sizes[bisect_left(self._sizes, num_seqs)]

    # The captured functions read only tensors at fixed addresses.

    def _run_model(self, inputs: "_StaticInputs") -> None:
        input_ids = carry_over(inputs.input_ids, inputs.carried, self._tokens)
        hidden = self._model.forward(input_ids, inputs.positions, self._kv_caches, inputs.metadata())
        self._hidden[: inputs.size].copy_(hidden)

    def _sample(self, inputs: "_StaticInputs", choice: Choice) -> None:
        logits = self._model.compute_logits(self._hidden[: inputs.size])
        tokens = self._tokens[: inputs.size]
        if self._parallel.rank == 0:
            if choice is Choice.GREEDY:
                tokens.copy_(device_sampling.greedy(logits))
            else:
                tokens.copy_(device_sampling.choose(logits, inputs.rows))
        self._parallel.broadcast(tokens)


def carry_over(input_ids: Tensor, carried: Tensor, tokens: Tensor) -> Tensor:
    """Return input_ids [num_seqs] in which each i with carried[i] >= 0 is replaced by tokens[carried[i]].

    A sequence whose last token is -1, since no token could be chosen, computes with token 0: it ends as soon
    as the host reads that -1.
    """
    return torch.where(carried >= 0, tokens[carried.clamp(min=0)], input_ids).clamp_(min=0)


def bucket_sizes(max_num_seqs: int) -> list[int]:
    """Return 1, 2, 4, 8, then every multiple of 16: a padded row is cheap in large batches, and capturing a
    bucket takes time at the start.
    """
    sizes = [size for size in (1, 2, 4, 8) if size < max_num_seqs]
    return [*sizes, *range(16, max_num_seqs, 16), max_num_seqs]


class _StaticInputs:
    """The inputs of one bucket's graphs, at fixed addresses."""

    def __init__(self, size: int, max_blocks: int, device: torch.device):
        self.size, self._device = size, device
        self._numbers = Staging(self._padded(), device)
        self.input_ids, self.positions, self._slot_mapping, self.carried, self._seq_lens = (
            self._numbers.tensors
        )
        self._block_tables = torch.zeros(size, max_blocks, dtype=torch.int32, device=device)
        self._query_start_loc = torch.arange(size + 1, dtype=torch.int32, device=device)
        self.rows = torch.zeros(size, device_sampling.NUM_PARAMS, device=device)

    def fill(self, inputs: StepInputs) -> None:
        num_seqs, max_blocks = inputs.block_tables.shape
        numbers = self._padded()
        input_ids, positions, slot_mapping, carried, seq_lens = (array[:num_seqs] for array in numbers)
        input_ids[:], positions[:], slot_mapping[:] = inputs.input_ids, inputs.positions, inputs.slot_mapping
        if inputs.carried is not None:
            carried[:] = inputs.carried
        seq_lens[:] = inputs.kv_lens
        self._numbers.fill(numbers)
        # The rest holds tables of earlier steps, which no sequence length reaches.
        self._block_tables[:num_seqs, :max_blocks].copy_(to_device(inputs.block_tables, self._device))

    def fill_rows(self, rows: np.ndarray) -> None:
        self.rows[: len(rows)].copy_(to_device(rows, self._device))

    def metadata(self) -> AttentionMetadata:
        return AttentionMetadata(
            slot_mapping=self._slot_mapping,
            block_tables=self._block_tables,
            seq_lens=self._seq_lens,
            query_start_loc=self._query_start_loc,
            num_decodes=self.size,
            query_lens=[1] * self.size,
            kv_lens=[],
        )

    def _padded(self) -> list[np.ndarray]:
        """Return ids, positions, slots, carried rows and lengths of sequences without tokens, which write no
        KV.
        """
        zeros, nowhere = np.zeros(self.size, np.int64), np.full(self.size, -1, np.int64)
        return [zeros, zeros.copy(), nowhere, nowhere.copy(), np.zeros(self.size, np.int32)]
