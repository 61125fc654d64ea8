"""Measures the effect of settings: KV formats and block sizes, attention, CUDA graphs, scheduling ahead."""

import gc
from dataclasses import asdict, dataclass

import torch

from benchmarks.gpu_check.cells import Cells, Figures
from benchmarks.gpu_check.plan import Plan
from benchmarks.gpu_check.random_model import kernels_for
from benchmarks.gpu_check.subject import Subject, bandwidth
from ingine.engine.kernels.select import triton_kernels


@dataclass(frozen=True)
class Variant:
    kv_cache_dtype: str = "auto"
    block_size: int = 16
    async_scheduling: bool = True
    triton: bool = False
    """True for Triton's attention even with block sizes for which the engine uses torch's."""
    cuda_graphs: bool = True


VARIANTS = {
    "as it is": Variant(),
    "KV in fp8": Variant(kv_cache_dtype="fp8"),
    "KV in int8": Variant(kv_cache_dtype="int8"),
    "KV in int4": Variant(kv_cache_dtype="int4"),
    "blocks of 32": Variant(block_size=32),
    "blocks of 64": Variant(block_size=64),
    "blocks of 256": Variant(block_size=256),
    "blocks of 256, Triton": Variant(block_size=256, triton=True),
    "not scheduled ahead": Variant(async_scheduling=False),
    "no CUDA graphs": Variant(cuda_graphs=False),
}


def run(plan: Plan, cells: Cells) -> None:
    bytes_per_s = bandwidth(plan, cells)
    batch, context = plan.compared
    for name, variant in VARIANTS.items():
        settings = {"batch": batch, "context": context, **asdict(variant)}
        cells.run(name, settings, _measure, plan, variant, bytes_per_s)


def _measure(plan: Plan, variant: Variant, bytes_per_s: float | None) -> Figures:
    # The previous engine and its CUDA graphs release their memory first.
    gc.collect()
    if plan.device == "cuda":
        torch.cuda.empty_cache()
    if variant.triton:
        kernels = triton_kernels(variant.kv_cache_dtype)
    else:
        kernels = kernels_for(plan, block_size=variant.block_size, kv_cache_dtype=variant.kv_cache_dtype)
    if not variant.cuda_graphs:
        kernels.attention.can_be_captured = False  # this backend object is not shared
    batch, context = plan.compared
    subject = Subject.build(
        plan,
        kernels,
        max_num_seqs=batch,
        context=context,
        block_size=variant.block_size,
        kv_cache_dtype=variant.kv_cache_dtype,
        async_scheduling=variant.async_scheduling,
    )
    subject.warm_up(plan)
    return {
        "attention": subject.attention,
        **subject.decode(plan, batch, context, bytes_per_s=bytes_per_s),
    }
