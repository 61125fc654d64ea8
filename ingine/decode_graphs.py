"""Steps in which every sequence decodes one token, as CUDA graphs.

A step of a small batch is hundreds of kernels of a few microseconds each: put in line one by one they take
longer than they run. A graph puts all of them in line at once. It repeats what was captured to the letter,
each number of Python's included, so there is a graph for each bucket of batch sizes and each way to end,
and all else, lengths above all, lies in tensors that do not move. A batch is padded to its bucket by
sequences without tokens.
"""

import logging
import time
from bisect import bisect_left
from collections.abc import Callable
from enum import StrEnum

import numpy as np
import torch
from torch import Tensor

from ingine import device_sampling
from ingine.attention import AttentionMetadata, KVCache
from ingine.models import Decoder
from ingine.parallel import TensorParallel
from ingine.step_inputs import StepInputs
from ingine.transfer import Staging

logger = logging.getLogger(__name__)

Replay = Callable[[], None]
Capture = Callable[[Callable[[], None]], Replay]
"""Runs a function and returns what repeats its kernels, on whatever its tensors hold then."""


class Ending(StrEnum):
    """What a graph ends with. Sampling is in it where it takes no more than logits and a row of numbers."""

    GREEDY = "greedy"
    RANDOM = "random"
    HIDDEN = "hidden"
    """Final hidden states: penalties and the like come after the graph."""


class DecodeGraphs:
    """All are captured at once, the largest first: the others then fit into the memory that it took."""

    def __init__(
        self,
        model: Decoder,
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
        self._hidden = torch.empty(
            max_num_seqs, model.config.hidden_size, dtype=model.dtype, device=model.device
        )
        self._sizes = bucket_sizes(max_num_seqs)
        self._inputs: dict[int, _StaticInputs] = {}
        self._replays: dict[tuple[int, Ending], Replay] = {}
        began = time.perf_counter()
        for size in reversed(self._sizes):
            inputs = self._inputs[size] = _StaticInputs(size, max_blocks, model.device)
            for ending in Ending:
                self._replays[size, ending] = capture(lambda: self._step(inputs, ending))  # noqa: B023
        seconds = time.perf_counter() - began
        logger.info("captured %d CUDA graphs in %.1f s", len(self._replays), seconds)

    def covers(self, inputs: StepInputs) -> bool:
        return inputs.is_decode and len(inputs.query_lens) <= self._sizes[-1]

    def run(self, inputs: StepInputs, ending: Ending, rows: np.ndarray | None) -> Tensor:
        """Puts a step that is covered in line. rows: of `device_sampling.pack_params`, for RANDOM.

        Returns final hidden states [num_seqs, hidden_size], or the sampled tokens [num_seqs]; a view, good
        until the next call.
        """
        num_seqs = len(inputs.query_lens)
        size = self._sizes[bisect_left(self._sizes, num_seqs)]
        self._inputs[size].fill(inputs, rows)
        self._replays[size, ending]()
        return (self._hidden if ending is Ending.HIDDEN else self._tokens)[:num_seqs]

    def _step(self, inputs: "_StaticInputs", ending: Ending) -> None:
        """What is captured: reads nothing but tensors that stay where they are."""
        size = inputs.size
        input_ids = carry_over(inputs.input_ids, inputs.carried, self._tokens)
        hidden = self._model.forward(input_ids, inputs.positions, self._kv_caches, inputs.metadata())
        if ending is Ending.HIDDEN:
            self._hidden[:size].copy_(hidden)
            return
        logits = self._model.compute_logits(hidden)
        tokens = self._tokens[:size]
        if self._parallel.rank == 0:
            greedy = ending is Ending.GREEDY
            chosen = device_sampling.greedy(logits) if greedy else device_sampling.choose(logits, inputs.rows)
            tokens.copy_(chosen)
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
    """Tensors of one bucket, in one piece of memory that is filled by one copy."""

    def __init__(self, size: int, max_blocks: int, device: torch.device):
        self.size, self._max_blocks = size, max_blocks
        self._staging = Staging(self._arrays(None, None), device)
        (
            self.input_ids,
            self.positions,
            self._slot_mapping,
            self.carried,
            self._seq_lens,
            self._block_tables,
            self.rows,
        ) = self._staging.tensors
        self._query_start_loc = torch.arange(size + 1, dtype=torch.int32, device=device)

    def fill(self, inputs: StepInputs, rows: np.ndarray | None) -> None:
        self._staging.fill(self._arrays(inputs, rows))

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

    def _arrays(self, inputs: StepInputs | None, rows: np.ndarray | None) -> list[np.ndarray]:
        """The eight-byte ones first. Rows beyond those of `inputs` have no tokens, and write nowhere."""
        size = self.size
        arrays = [
            np.zeros(size, np.int64),
            np.zeros(size, np.int64),
            np.full(size, -1, np.int64),
            np.full(size, -1, np.int64),
            np.zeros(size, np.int32),
            np.zeros((size, self._max_blocks), np.int32),
            np.zeros((size, device_sampling.NUM_PARAMS), np.float32),
        ]
        if inputs is None:
            return arrays
        num_seqs, max_blocks = inputs.block_tables.shape
        input_ids, positions, slot_mapping, carried, seq_lens, block_tables, params = arrays
        input_ids[:num_seqs] = inputs.input_ids
        positions[:num_seqs] = inputs.positions
        slot_mapping[:num_seqs] = inputs.slot_mapping
        if inputs.carried is not None:
            carried[:num_seqs] = inputs.carried
        seq_lens[:num_seqs] = inputs.kv_lens
        block_tables[:num_seqs, :max_blocks] = inputs.block_tables
        if rows is not None:
            params[:num_seqs] = rows
        return arrays
