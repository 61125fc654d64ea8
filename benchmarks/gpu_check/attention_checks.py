"""Compares attention on the device with the textbook formula in float64, over random shapes and schedules.

The harness of the tests runs the cases: keys and values are in shuffled blocks of memory that held NaN, and
are computed in prefills, chunks, decodes and mixtures of them.
"""

import random
from dataclasses import asdict

import torch
from torch import Tensor

from benchmarks.gpu_check.cells import Cells, Figures, Skipped
from benchmarks.gpu_check.device import name_of
from benchmarks.gpu_check.plan import Plan
from ingine.engine.kernels.attention import AttentionBackend
from ingine.engine.kernels.attention.varlen import VarlenAttention, find_varlen_attn
from ingine.engine.kernels.select import select_kernels, triton_kernels
from ingine.errors import ConfigError
from tests.engine.paged_attention import Attention, as_int4

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2}
"""Tolerance for outputs of about 1: sums of hundreds in float32, and half a dozen roundings to bfloat16."""
QUANTIZED_TOLERANCE = {"int8": 5e-2, "int4": 4e-1, "fp8": 2e-1}
"""Tolerance of the formula on quantised keys and values. It rotates keys in bfloat16; a key rotated in
float32 may be rounded to the neighbouring number, which in fp8 is up to an eighth away."""
NUM_SCHEDULES = 2

VARLEN_CASES = (
    Attention(num_heads=12, num_kv_heads=2, head_dim=128, block_size=256, dtype=torch.bfloat16, rotary=True),
    Attention(num_heads=9, num_kv_heads=3, head_dim=64, block_size=256, dtype=torch.bfloat16),
    Attention(
        num_heads=8,
        num_kv_heads=8,
        head_dim=128,
        block_size=256,
        dtype=torch.bfloat16,
        sliding_window=100,
        rotary=True,
    ),
)
"""Cases for torch's own attention over paged KV, if this torch has it."""


def run(plan: Plan, device: torch.device, cells: Cells) -> None:
    for seed in range(plan.num_attention_cases):
        attention, kv_cache_dtype = random_case(seed, tiny=device.type == "cpu")
        settings = asdict(attention) | {"dtype": name_of(attention.dtype), "kv_cache_dtype": kv_cache_dtype}
        cells.run("attention", settings, _check_triton, attention, kv_cache_dtype, seed, plan, device)
    for seed, attention in enumerate(VARLEN_CASES):
        settings = asdict(attention) | {"dtype": name_of(attention.dtype)}
        cells.run("attention of torch", settings, _check_varlen, attention, seed, plan, device)


def random_case(seed: int, *, tiny: bool) -> tuple[Attention, str]:
    """The case of a seed. Most fields cycle with a period of their own: 16 seeds cover all values."""
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
    return attention, ("auto", "int4", "int8", "auto", "auto", "fp8")[seed % 6]


def quantized(new: Tensor, kv_cache_dtype: str) -> Tensor:
    """Keys or values [num_tokens, num_kv_heads, head_dim] as KV memory returns them, with a scale per token
    and head."""
    if kv_cache_dtype == "auto":
        return new
    if kv_cache_dtype == "int4":
        return as_int4(new)
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


def _check_triton(
    attention: Attention, kv_cache_dtype: str, seed: int, plan: Plan, device: torch.device
) -> Figures:
    if device.type == "cpu":
        backend = triton_kernels(kv_cache_dtype).attention
    else:
        try:
            backend = select_kernels(
                device, attention.dtype, head_dim=attention.head_dim, kv_cache_dtype=kv_cache_dtype
            ).attention
        except ConfigError as reason:
            raise Skipped(str(reason)) from None
    return _compare(attention, backend, kv_cache_dtype, seed, plan, device)


def _check_varlen(attention: Attention, seed: int, plan: Plan, device: torch.device) -> Figures:
    if device.type != "cuda":
        raise Skipped("it runs on CUDA only")
    varlen_attn = find_varlen_attn()
    if varlen_attn is None:
        raise Skipped("this torch's varlen_attn takes no paged KV")
    return _compare(attention, VarlenAttention(varlen_attn), "auto", seed, plan, device)


def _compare(
    attention: Attention,
    backend: AttentionBackend,
    kv_cache_dtype: str,
    seed: int,
    plan: Plan,
    device: torch.device,
) -> Figures:
    rng = random.Random(seed)
    errors = [
        attention.errors(
            backend,
            random_schedule(rng, plan.longest_prompt),
            stored=lambda new: quantized(new, kv_cache_dtype),
        )
        for _ in range(NUM_SCHEDULES if device.type != "cpu" else 1)
    ]
    worst = torch.cat(errors).max().item()  # NaN if any is NaN, which is over the tolerance
    tolerance = QUANTIZED_TOLERANCE.get(kv_cache_dtype, TOLERANCE[attention.dtype])
    return {"kernel": backend.name, "worst_error": worst, "tolerance": tolerance, "ok": worst < tolerance}
