"""Breaks down the time of a decode step, with torch's profiler on the device."""

import re
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_check import streams
from benchmarks.gpu_check.cells import Cells, Figures
from benchmarks.gpu_check.plan import Plan
from benchmarks.gpu_check.random_model import kernels_for
from benchmarks.gpu_check.subject import Subject
from benchmarks.gpu_check.timing import synchronize
from ingine.engine.engine import Engine

NUM_STEPS = 4
NUM_NAMED = 12
"""Kernels that are listed by name, the longest first."""
NUM_CHARACTERS = 80
"""Characters of such a name; kernels that differ only after these are summed."""

GROUPS = {
    "matrix products": (
        r"gemm|gemv|cutlass|cublas|nvjet|xmma|splitkreduce|aten::linear|stored_linear|sum_pieces"
    ),
    "attention": r"^_(write|decode|reduce|prefill)_kernel|flash|fmha|attention",
    "norms and activation": r"norm|silu",
    "sampling": r"choose|max|topk|sort|radix|gatherTopK|scan|cumsum",
    "copies": r"memcpy|memset|copy|index|gather|scatter|cat|embedding|fill|where",
}
"""A kernel belongs to the first group whose pattern matches its name, ignoring case, else to the rest."""


def run(plan: Plan, cells: Cells) -> None:
    context = plan.compared[1]
    subject = Subject.build(
        plan,
        kernels_for(plan, block_size=plan.block_size),
        max_num_seqs=max(plan.traced),
        context=context,
        block_size=plan.block_size,
        async_scheduling=True,
    )
    subject.warm_up(plan)
    for batch in plan.traced:
        cells.run("trace", {"batch": batch, "context": context}, trace_decode, subject.engine, batch, plan)


def trace_decode(engine: Engine, batch: int, plan: Plan) -> Figures:
    """Milliseconds per step by group of kernels, and of gaps in which the device is idle.

    The profiler slows the host down, so gaps are longer than without it; kernel times are not affected.
    """
    device = torch.device(plan.device)
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    try:
        streams.start(engine, batch, plan.compared[1], plan)
        synchronize(device)
        with profile(activities=activities) as profiler:
            for _ in range(NUM_STEPS):
                engine.step()
            synchronize(device)
    finally:
        streams.finish(engine)
    return summarize(_on_device(profiler.events(), is_cuda=device.type == "cuda"))


def _on_device(events: Iterable[FunctionEvent], *, is_cuda: bool) -> list[tuple[str, float, float]]:
    """Name, start and end in microseconds of each kernel; on a CPU, of each outermost operation."""
    if is_cuda:
        found = [event for event in events if event.device_type == DeviceType.CUDA]
    else:
        found = [event for event in events if event.cpu_parent is None]
    return [(event.name, event.time_range.start, event.time_range.end) for event in found]


def summarize(kernels: list[tuple[str, float, float]]) -> Figures:
    """Sum (name, start, end) in microseconds, of `NUM_STEPS` steps, to milliseconds per step."""
    groups, names = defaultdict(float), defaultdict(float)
    busy_until = first = min(start for _, start, _ in kernels)
    gaps = 0.0
    for name, start, end in sorted(kernels, key=lambda kernel: kernel[1]):
        groups[group_of(name)] += end - start
        names[name[:NUM_CHARACTERS]] += end - start
        gaps += max(0.0, start - busy_until)
        busy_until = max(busy_until, end)
    named = sorted(names, key=names.get, reverse=True)[:NUM_NAMED]
    per_step = 1e-3 / NUM_STEPS
    return {
        "step_ms": (busy_until - first) * per_step,
        "num_kernels": len(kernels) / NUM_STEPS,
        "groups_ms": {
            **{group: us * per_step for group, us in sorted(groups.items())},
            "gaps": gaps * per_step,
        },
        "kernels_ms": {name: names[name] * per_step for name in named},
    }


def group_of(name: str) -> str:
    return next(
        (group for group, pattern in GROUPS.items() if re.search(pattern, name, re.IGNORECASE)), "rest"
    )
