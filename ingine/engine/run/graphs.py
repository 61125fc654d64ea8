"""Steps in which every sequence decodes one token, as CUDA graphs.

A step of a small batch is hundreds of kernels of a few microseconds each: put in line one by one they may
take longer than they run. A graph puts all of them in line at once. It repeats what was captured to the
letter, Python's numbers included, so there is one for each bucket of batch sizes, and all else, lengths above
all, lies in tensors that do not move. A batch is padded to its bucket by sequences without tokens.
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
"""Runs a function and returns what repeats its kernels, on whatever its tensors hold then."""


class Choice(StrEnum):
    """How a graph samples: where it takes no more than logits and, for a random one, a row of numbers."""

    GREEDY = "greedy"
    RANDOM = "random"


class DecodeGraphs:
    """For each bucket one of the model and, behind it, one for each `Choice`.

    All are captured at once, the largest first: the others then fit into the memory that it took.
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
        """tokens: [at least max_num_seqs] int64, which graphs carry tokens over from, and sample into.

        max_blocks: of one sequence.
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
        return inputs.is_decode and len(inputs.query_lens) <= self._sizes[-1]

    def run_model(self, inputs: StepInputs) -> Tensor:
        """Puts a step that is covered in line. Returns its final hidden states [num_seqs, hidden_size], a
        view that is good until the next call.
        """
        num_seqs = len(inputs.query_lens)
        size = self._size_for(num_seqs)
        self._inputs[size].fill(inputs)
        self._model_graphs[size]()
        return self._hidden[:num_seqs]

    def sample(self, num_seqs: int, choice: Choice, rows: np.ndarray | None) -> Tensor:
        """Puts in line what samples from the hidden states of the last `run_model`. Returns the tokens
        [num_seqs], a view likewise.

        rows: of `device_sampling.pack_params`, for Choice.RANDOM on rank 0.
        """
        size = self._size_for(num_seqs)
        if rows is not None:
            self._inputs[size].fill_rows(rows)
        self._sampling_graphs[size, choice]()
        return self._tokens[:num_seqs]

    def _size_for(self, num_seqs: int) -> int:
        return self._sizes[bisect_left(self._sizes, num_seqs)]

    # What is captured reads nothing but tensors that stay where they are.

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
    """input_ids [num_seqs], but where `carried` [num_seqs] is not -1 the token of that row of `tokens`.

    A sequence whose last token is -1, there having been nothing to choose, computes some token or other:
    it ends as soon as the host hears of it.
    """
    return torch.where(carried >= 0, tokens[carried.clamp(min=0)], input_ids).clamp_(min=0)


def bucket_sizes(max_num_seqs: int) -> list[int]:
    """1, 2, 4, 8, then every 16: there a padded row is cheap, and each bucket costs time at the start."""
    sizes = [size for size in (1, 2, 4, 8) if size < max_num_seqs]
    return [*sizes, *range(16, max_num_seqs, 16), max_num_seqs]


class _StaticInputs:
    """What the graphs of one bucket read."""

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
        # Beyond this are tables of earlier steps, which no length reaches.
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
        """Of sequences without tokens, which write nowhere: ids, positions, slots, carried rows, lengths."""
        zeros, nowhere = np.zeros(self.size, np.int64), np.full(self.size, -1, np.int64)
        return [zeros, zeros.copy(), nowhere, nowhere.copy(), np.zeros(self.size, np.int32)]
