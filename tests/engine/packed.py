"""Drives models and backends as the engine does, a packed step at a time, but without a scheduler."""

import random
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ingine.engine.kernels.attention import AttentionMetadata
from ingine.engine.kernels.layers.linear import Linear
from ingine.engine.models.decoder import Decoder

CPU = torch.device("cpu")
_forward = Linear.forward


def forward_by_length(self: Linear, x: Tensor, metadata: AttentionMetadata | None = None) -> Tensor:
    """In place of `Linear.forward`: makes of each sequence's rows what depends on how long it is, as an
    adapter of its own would. What it reads lies on the device.
    """
    y = _forward(self, x, metadata)
    if metadata is None:
        return y
    ends = metadata.query_start_loc[1:]
    rows = torch.arange(len(x), dtype=ends.dtype, device=x.device)
    seq_lens = metadata.seq_lens[torch.searchsorted(ends, rows, right=True)]
    return y * (1 + seq_lens[:, None] / 64)


@dataclass
class PagedSequence:
    token_ids: list[int]
    block_table: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0


class BlockPool:
    """Hands out blocks in a random order: a table that happens to be contiguous would hide a wrong lookup."""

    def __init__(self, num_blocks: int, block_size: int):
        self.block_size = block_size
        self._free = random.Random(0).sample(range(num_blocks), num_blocks)

    def grow(self, sequence: PagedSequence, num_tokens: int) -> None:
        while len(sequence.block_table) * self.block_size < num_tokens:
            sequence.block_table.append(self._free.pop())


def pack(
    step: list[tuple[PagedSequence, int]], pool: BlockPool, device: torch.device = CPU
) -> tuple[Tensor, AttentionMetadata]:
    """Positions and metadata of a step: sequences, each with the number of its next tokens to compute.

    Puts `step` into the order of the interface: decodes first, of these the shortest first.
    """
    step.sort(key=lambda item: (item[1] != 1, item[0].num_computed_tokens))
    positions, slots, kv_lens = [], [], []
    for sequence, query_len in step:
        kv_lens.append(sequence.num_computed_tokens + query_len)
        pool.grow(sequence, kv_lens[-1])
        for position in range(sequence.num_computed_tokens, kv_lens[-1]):
            block = sequence.block_table[position // pool.block_size]
            slots.append(block * pool.block_size + position % pool.block_size)
            positions.append(position)
    query_lens = [query_len for _, query_len in step]
    width = max(len(sequence.block_table) for sequence, _ in step)
    tables = [table + table[:1] * (width - len(table)) for table in (s.block_table for s, _ in step)]
    query_start_loc = [sum(query_lens[:index]) for index in range(len(query_lens) + 1)]
    metadata = AttentionMetadata(
        slot_mapping=torch.tensor(slots, device=device),
        block_tables=torch.tensor(tables, dtype=torch.int32, device=device),
        seq_lens=torch.tensor(kv_lens, dtype=torch.int32, device=device),
        query_start_loc=torch.tensor(query_start_loc, dtype=torch.int32, device=device),
        num_decodes=query_lens.count(1),
        query_lens=query_lens,
        kv_lens=kv_lens,
    )
    return torch.tensor(positions, device=device), metadata


class PackedModel:
    """A decoder with paged memory. `step` returns each sequence's logits, one row a computed token."""

    def __init__(self, model: Decoder, *, block_size: int = 4, num_blocks: int = 200):
        self.model = model
        self.pool = BlockPool(num_blocks, block_size)
        self.kv_caches = model.allocate_kv_caches(num_blocks, block_size)

    @torch.inference_mode()
    def step(self, *step: tuple[PagedSequence, int]) -> list[Tensor]:
        """Compute the next `count` tokens of each (sequence, count), all in one packed batch."""
        order = list(step)
        positions, metadata = pack(order, self.pool)
        input_ids = torch.tensor(
            [
                token_id
                for sequence, query_len in order
                for token_id in sequence.token_ids[sequence.num_computed_tokens :][:query_len]
            ]
        )
        hidden = self.model(input_ids, positions, self.kv_caches, metadata)
        logits = self.model.compute_logits(hidden).split(metadata.query_lens)
        for sequence, query_len in order:
            sequence.num_computed_tokens += query_len
        by_sequence = {id(sequence): rows for (sequence, _), rows in zip(order, logits, strict=True)}
        return [by_sequence[id(sequence)] for sequence, _ in step]
