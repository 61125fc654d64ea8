"""One layer's attention over paged memory that held NaN, a step at a time, beside the textbook formula."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ingine.engine.kernels.attention import AttentionBackend, KVCache, NativeAttention, TorchAttention
from ingine.engine.kernels.layers.int8 import rotate
from ingine.engine.kernels.layers.rotary import RotaryEmbedding, apply_rotary
from tests.engine.packed import CPU, BlockPool, PagedSequence, pack


def device_of(backend: AttentionBackend) -> torch.device:
    """The device of a kernel's tensors.

    Kernels for GPUs use a GPU if there is one, else triton's interpreter.
    """
    on_cpu = isinstance(backend, (TorchAttention, NativeAttention)) or not torch.cuda.is_available()
    return CPU if on_cpu else torch.device("cuda")


@dataclass(frozen=True)
class Attention:
    """A layer, and the tokens of its sequences: those of a sequence follow from its index."""

    num_heads: int = 6
    num_kv_heads: int = 2
    head_dim: int = 16
    block_size: int = 4
    dtype: torch.dtype = torch.float32
    sliding_window: int | None = None
    rotary: bool = False

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    def make_qkv(self, num_tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Make queries, keys and values like the decoder: non-contiguous views of one merged projection."""
        generator = torch.Generator().manual_seed(seed)
        shape = (num_tokens, self.num_heads + 2 * self.num_kv_heads, self.head_dim)
        return self._split(torch.randn(shape, generator=generator).to(self.dtype))

    def rotation(self, positions: Tensor) -> tuple[Tensor, Tensor] | None:
        if not self.rotary:
            return None
        inv_freq = tuple(100.0 ** (-2 * i / self.head_dim) for i in range(self.head_dim // 2))
        return RotaryEmbedding(inv_freq, 1.0, dtype=self.dtype, device=positions.device)(positions)

    def allocate(self, backend: AttentionBackend, num_blocks: int) -> KVCache:
        kv_cache = backend.allocate_kv_cache(
            num_blocks, self.block_size, self.num_kv_heads, self.head_dim, self.dtype, device_of(backend)
        )
        for memory in kv_cache:  # what an earlier sequence may have left in any block
            whole = torch.empty(0, dtype=memory.dtype, device=memory.device).set_(memory.untyped_storage())
            whole.view(torch.uint8).fill_(0xFF)  # NaN, in every floating dtype
        return kv_cache

    def attend(
        self, backend: AttentionBackend, kv_cache: KVCache, pool: BlockPool, step: list, tokens: list
    ) -> Tensor:
        """Compute a step of [(sequence, its new tokens)], tokens being (query, key, value) of each."""
        by_sequence = {id(sequence): new for (sequence, _), new in zip(step, tokens, strict=True)}
        device = device_of(backend)
        positions, metadata = pack(step, pool, device)
        merged = torch.cat([torch.cat(by_sequence[id(sequence)], dim=1) for sequence, _ in step])
        query, key, value = self._split(merged.to(device))
        output = backend.forward(
            query,
            key,
            value,
            kv_cache,
            metadata,
            scale=self.scale,
            sliding_window=self.sliding_window,
            rotation=self.rotation(positions),
        )
        assert output.shape == query.shape and output.is_contiguous()
        return output.cpu()

    def run(self, backend: AttentionBackend, steps: list[list[tuple[int, int]]]) -> dict[int, Tensor]:
        """Run steps of [(sequence, query tokens)]. Returns what came of all tokens of each sequence."""
        totals = num_tokens(steps)
        num_blocks = sum(-(-total // self.block_size) for total in totals.values())
        pool, kv_cache = BlockPool(num_blocks, self.block_size), self.allocate(backend, num_blocks)
        sequences = {index: PagedSequence([]) for index in totals}
        indices = {id(sequence): index for index, sequence in sequences.items()}
        inputs = {index: self.make_qkv(total, index) for index, total in totals.items()}
        outputs: dict[int, list[Tensor]] = {index: [] for index in totals}
        for step in steps:
            order = [(sequences[index], query_len) for index, query_len in step]
            tokens = [
                [new[sequences[index].num_computed_tokens :][:query_len] for new in inputs[index]]
                for index, query_len in step
            ]
            output = self.attend(backend, kv_cache, pool, order, tokens)
            for (sequence, query_len), rows in zip(order, output.split([n for _, n in order]), strict=True):
                outputs[indices[id(sequence)]].append(rows)
                sequence.num_computed_tokens += query_len
        return {index: torch.cat(rows) for index, rows in outputs.items()}

    def expected(
        self, index: int, num_tokens: int, stored: Callable[[Tensor], Tensor] = lambda new: new
    ) -> Tensor:
        """The formula, for all tokens of a sequence; `stored` is what memory makes of keys and values."""
        query, key, value = self.make_qkv(num_tokens, index)
        if self.rotary:
            rotation = self.rotation(torch.arange(num_tokens))
            query, key = apply_rotary(query, *rotation), apply_rotary(key, *rotation)
        return attend_densely(query, stored(key), stored(value), self.scale, self.sliding_window)

    def errors(
        self,
        backend: AttentionBackend,
        steps: list[list[tuple[int, int]]],
        stored: Callable[[Tensor], Tensor] = lambda new: new,
    ) -> Tensor:
        """The distance of each number of `run` from the formula."""
        outputs = self.run(backend, steps).items()
        return torch.cat(
            [
                (out.double() - self.expected(index, len(out), stored)).abs().flatten()
                for index, out in outputs
            ]
        )

    def worst_error(self, backend: AttentionBackend, steps: list[list[tuple[int, int]]]) -> float:
        return self.errors(backend, steps).max().item()

    def _split(self, merged: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return merged.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)


def attend_densely(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, sliding_window: int | None
) -> Tensor:
    """The textbook formula, in float64, for one sequence: query [Q, H, D], keys and values [KV, Hkv, D]."""
    group = query.shape[1] // keys.shape[1]
    query, keys, values = query.double(), keys.double(), values.double()
    keys, values = keys.repeat_interleave(group, dim=1), values.repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,khd->hqk", query, keys) * scale
    distance = torch.arange(len(keys) - len(query), len(keys))[:, None] - torch.arange(len(keys))
    hidden = distance < 0
    if sliding_window is not None:
        hidden |= distance >= sliding_window
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), values)


def as_int8(new: Tensor) -> Tensor:
    """Round keys or values [tokens, heads, head_dim] as memory in int8 does."""
    scale = new.float().abs().amax(-1, keepdim=True) / 127
    return (new.float() * (1 / scale)).round() * scale


def as_int4(new: Tensor) -> Tensor:
    """Round keys or values [tokens, heads, head_dim] as memory in 4 bits does: 16 levels, in the basis of a
    Hadamard matrix. The least level of a token's head, and their distance, are bfloat16."""
    rows = rotate(new.flatten(0, 1))
    lowest = rows.amin(-1, keepdim=True).bfloat16().float()
    scale = ((rows.amax(-1, keepdim=True) - lowest) / 15).bfloat16().float()
    codes = ((rows - lowest) / scale.clamp_min(torch.finfo(torch.float32).tiny)).round().clamp(0, 15)
    return rotate(codes * scale + lowest).view(new.shape)


def num_tokens(steps: list[list[tuple[int, int]]]) -> Counter[int]:
    """Tokens of each sequence, in all steps."""
    return sum((Counter(dict(step)) for step in steps), Counter())
