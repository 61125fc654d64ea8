"""Attention on the device beside the textbook formula in float64, over random shapes and schedules.

The harness of the tests makes the cases: keys and values in shuffled blocks of memory that held NaN, computed
in prefills, chunks, decodes and mixtures of them. It works on the CPU; `OnDevice` takes a backend there.
"""

import random
from dataclasses import asdict, replace

import torch
from torch import Tensor

from benchmarks.gpu_check.cells import Cells, Figures, Skipped
from benchmarks.gpu_check.device import name_of
from benchmarks.gpu_check.plan import Plan
from ingine.attention import AttentionBackend, AttentionMetadata, KVCache
from ingine.errors import ConfigError
from ingine.kernels import select_kernels, triton_kernels
from tests.engine.paged_attention import Attention

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2}
"""Of outputs of about 1: float32 in sums of hundreds, and half a dozen roundings to bfloat16."""
QUANTIZED_TOLERANCE = {"int8": 5e-2, "fp8": 2e-1}
"""Beside the formula on quantised keys and values. A key that is rotated in float32 and not, as the
formula's, in bfloat16 may be rounded to the next number, which in fp8 is up to an eighth away."""
NUM_SCHEDULES = 3


class OnDevice(AttentionBackend):
    """`backend` on `device` for a harness on the CPU. Holds the one layer's cache itself."""

    def __init__(self, backend: AttentionBackend, device: torch.device):
        self.name = backend.name
        self._backend, self._device = backend, device
        self._kv_cache: KVCache = ()

    def allocate_kv_cache(
        self,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> KVCache:
        self._kv_cache = self._backend.allocate_kv_cache(
            num_blocks, block_size, num_kv_heads, head_dim, dtype, self._device
        )
        for memory in self._kv_cache:
            memory.view(torch.uint8).fill_(0xFF)  # NaN, in every floating dtype
        return ()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: KVCache,
        metadata: AttentionMetadata,
        *,
        scale: float,
        sliding_window: int | None,
        rotation: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        # Views of one merged projection, as the decoder has them.
        merged = torch.cat((query, key, value), dim=1).to(self._device)
        query, key, value = merged.split((query.shape[1], key.shape[1], value.shape[1]), dim=1)
        on_device = {
            name: getattr(metadata, name).to(self._device)
            for name in ("slot_mapping", "block_tables", "seq_lens", "query_start_loc")
        }
        output = self._backend.forward(
            query,
            key,
            value,
            self._kv_cache,
            replace(metadata, **on_device),
            scale=scale,
            sliding_window=sliding_window,
            rotation=None if rotation is None else tuple(part.to(self._device) for part in rotation),
        )
        return output.cpu()


def run(plan: Plan, device: torch.device, cells: Cells) -> None:
    for seed in range(plan.num_attention_cases):
        attention, kv_cache_dtype = random_case(seed, tiny=device.type == "cpu")
        settings = asdict(attention) | {"dtype": name_of(attention.dtype), "kv_cache_dtype": kv_cache_dtype}
        cells.run("attention", settings, _check, attention, kv_cache_dtype, seed, plan, device)


def random_case(seed: int, *, tiny: bool) -> tuple[Attention, str]:
    """Periods without a common divisor: every few seeds have every value, in another combination."""
    rng = random.Random(seed)
    num_kv_heads, group = rng.choice((1, 2, 4)), seed % 8 + 1
    attention = Attention(
        num_heads=num_kv_heads * group,
        num_kv_heads=num_kv_heads,
        head_dim=16 if tiny else (128, 64, 96)[seed % 3],
        block_size=4 if tiny else (16, 32, 64, 128, 256)[seed % 5],
        dtype=(torch.float32, torch.bfloat16)[seed // 2 % 2],
        sliding_window=rng.choice((None, None, 1, 5, 100)),
        rotary=rng.random() < 0.7,
    )
    return attention, ("auto", "auto", "int8", "auto", "auto", "fp8")[seed % 6]


def quantized(new: Tensor, kv_cache_dtype: str) -> Tensor:
    """What memory makes of keys or values [num_tokens, num_kv_heads, head_dim]: a scale a token and head."""
    if kv_cache_dtype == "auto":
        return new
    largest = 127.0 if kv_cache_dtype == "int8" else torch.finfo(torch.float8_e4m3fn).max
    new = new.float()
    scale = new.abs().amax(dim=-1, keepdim=True) / largest
    scaled = new / scale
    rounded = scaled.round() if kv_cache_dtype == "int8" else scaled.to(torch.float8_e4m3fn).float()
    return rounded * scale


def random_schedule(rng: random.Random, longest: int) -> list[list[tuple[int, int]]]:
    """Steps of (sequence, query tokens): prefills, then mixtures, then decodes alone."""
    steps = [[(0, rng.randint(1, longest)), (1, rng.randint(1, longest))]]
    chunks = (1, 1, 2, 7, longest // 3)
    for _ in range(3):
        steps.append([(index, rng.choice(chunks)) for index in rng.sample(range(4), rng.randint(1, 4))])
    return [*steps, *[[(0, 1), (1, 1)]] * 2]


def _check(attention: Attention, kv_cache_dtype: str, seed: int, plan: Plan, device: torch.device) -> Figures:
    backend = OnDevice(_backend(attention, kv_cache_dtype, device), device)
    rng = random.Random(seed)
    errors = [
        attention.errors(
            backend,
            random_schedule(rng, plan.longest_prompt),
            stored=lambda new: quantized(new, kv_cache_dtype),
        )
        for _ in range(NUM_SCHEDULES if device.type != "cpu" else 1)
    ]
    worst = torch.cat(errors).max().item()  # NaN if one is, which is not under the tolerance
    tolerance = QUANTIZED_TOLERANCE.get(kv_cache_dtype, TOLERANCE[attention.dtype])
    return {"kernel": backend.name, "worst_error": worst, "tolerance": tolerance, "ok": worst < tolerance}


def _backend(attention: Attention, kv_cache_dtype: str, device: torch.device) -> AttentionBackend:
    if device.type == "cpu":
        return triton_kernels(kv_cache_dtype).attention
    try:
        kernels = select_kernels(
            device,
            attention.dtype,
            head_dim=attention.head_dim,
            kv_cache_dtype=kv_cache_dtype,
            block_size=attention.block_size,
        )
    except ConfigError as reason:
        raise Skipped(str(reason)) from None
    return kernels.attention
