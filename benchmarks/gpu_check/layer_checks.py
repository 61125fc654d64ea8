"""Compares the engine's operations between matrix products with torch's, on the device."""

import random
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.gpu_check.cells import Cells, Figures
from benchmarks.gpu_check.device import name_of
from benchmarks.gpu_check.plan import Plan
from ingine.engine.kernels.layers.ops import LayerOps
from ingine.engine.kernels.select import REFERENCE, triton_kernels

EPS = 1e-6
SIZES = (64, 96, 128, 576, 1536, 4096, 8960)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
"""Relative tolerance, and absolute near 0: two units in the last place of 16 bits."""

Operation = Callable[[LayerOps, Tensor, Tensor], tuple[Tensor, ...]]
"""An operation on x [T, size] and a weight [size]. Returns all tensors that it writes."""


def run(plan: Plan, device: torch.device, cells: Cells) -> None:
    sizes = SIZES if device.type != "cpu" else SIZES[:1]
    for name, operation in OPERATIONS.items():
        for dtype in TOLERANCE:
            settings = {"dtype": name_of(dtype), "sizes": sizes}
            cells.run(name, settings, _check, operation, dtype, sizes, plan.num_rows, device)


def rms_norm(ops: LayerOps, x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return (ops.rms_norm(x, weight, EPS),)


def rms_norm_of_heads(ops: LayerOps, x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """Normalise queries as in the decoder: they are a view of a merged projection."""
    heads = torch.stack((x, -x, 2 * x), dim=1)[:, :2]
    return (ops.rms_norm(heads, weight, EPS),)


def add_rms_norm(ops: LayerOps, x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    residual = x.flip(0)
    return ops.add_rms_norm(residual, x, weight, EPS), residual


def silu_mul(ops: LayerOps, x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return (ops.silu_mul(torch.cat((x, x.flip(0) * weight), dim=1)),)


OPERATIONS: dict[str, Operation] = {
    "rms_norm": rms_norm,
    "rms_norm of heads": rms_norm_of_heads,
    "add_rms_norm": add_rms_norm,
    "silu_mul": silu_mul,
}


def _check(
    operation: Operation, dtype: torch.dtype, sizes: tuple[int, ...], most_rows: int, device: torch.device
) -> Figures:
    """The largest error over `sizes`, each with a random number of rows, as a multiple of the tolerance."""
    rng, generator = random.Random(0), torch.Generator(device).manual_seed(0)
    ops, tolerance, worst = triton_kernels().ops, TOLERANCE[dtype], 0.0
    for size in sizes:
        shape = (rng.randint(1, most_rows), size)
        x = torch.randn(shape, generator=generator, device=device).to(dtype)
        weight = torch.rand(size, generator=generator, device=device).to(dtype) + 0.5
        found, expected = operation(ops, x, weight), operation(REFERENCE.ops, x, weight)
        for ours, theirs in zip(found, expected, strict=True):
            excess = (ours - theirs).abs().float() / (tolerance * (1 + theirs.abs().float()))
            worst = max(worst, excess.max().nan_to_num(nan=torch.inf).item())
    return {"kernel": ops.name, "worst_excess": worst, "ok": worst < 1}
