"""What the engine's settings change: formats and blocks of KV, CUDA graphs, scheduling ahead."""

import gc
from typing import Any

import torch

from benchmarks.gpu_check.cells import Cells, Figures
from benchmarks.gpu_check.plan import Plan
from benchmarks.gpu_check.subject import Subject, bandwidth

VARIANTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "KV in fp8": {"kv_cache_dtype": "fp8"},
    "KV in int8": {"kv_cache_dtype": "int8"},
    "blocks of 32": {"block_size": 32},
    "blocks of 64": {"block_size": 64},
    "blocks of 256": {"block_size": 256},
    "not scheduled ahead": {"async_scheduling": False},
}
"""Fields of `EngineConfig`. Blocks of 256 are those that torch's own attention takes, where it is present:
the figures say which attention served."""


def run(plan: Plan, cells: Cells) -> None:
    bytes_per_s = bandwidth(plan, cells)
    batch, context = plan.compared
    for name, changed in VARIANTS.items():
        cells.run(name, {"batch": batch, "context": context}, _measure, plan, changed, bytes_per_s)


def _measure(plan: Plan, changed: dict[str, Any], bytes_per_s: float | None) -> Figures:
    # The engine before this one, and its CUDA graphs, give their memory back first.
    gc.collect()
    if plan.device == "cuda":
        torch.cuda.empty_cache()
    batch, context = plan.compared
    subject = Subject.build(plan, max_num_seqs=batch, context=context, **changed)
    subject.warm_up(plan)
    return {
        "attention": subject.attention,
        **subject.decode(plan, batch, context, bytes_per_s=bytes_per_s),
    }
