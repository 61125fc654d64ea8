"""Compares products with quantised weights as stored with those of the same matrices made dense, on the
device: correctness and, on a GPU, the time of both.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_check.cells import Cells, Figures
from benchmarks.gpu_check.device import name_of
from benchmarks.gpu_check.plan import Plan
from benchmarks.gpu_check.timing import seconds_each
from ingine.engine.kernels.layers.stored import Int4Matrix, ScaledMatrix, StoredMatrix
from ingine.engine.kernels.select import triton_kernels

SHAPES = ((4096, 4096), (6144, 4096), (4096, 14336))
"""Rows and columns of some matrices of an 8B model."""
NUM_ROWS = (1, 16, 64, 1024)
DTYPE, TOLERANCE = torch.bfloat16, 2**-7
"""The tolerance is a share of the sum of the magnitudes of a product's terms."""


def run(plan: Plan, device: torch.device, cells: Cells) -> None:
    shapes, num_rows = (SHAPES, NUM_ROWS) if device.type != "cpu" else (((96, 256),), (3,))
    for kind in KINDS:
        settings = {"weights": kind, "dtype": name_of(DTYPE), "shapes": shapes, "rows": num_rows}
        cells.run("stored product", settings, _check, kind, shapes, num_rows, device)


def int4(n: int, k: int, dice: torch.Generator) -> Int4Matrix:
    codes, scales = _bytes(n, k // 2, dice), _random(n, k // 128, dice).half() + 0.01
    return Int4Matrix((n, k), codes, scales, (_random(n, k // 128, dice) * 15).half())


def int8(n: int, k: int, dice: torch.Generator) -> ScaledMatrix:
    return ScaledMatrix((n, k), _bytes(n, k, dice).view(torch.int8), _random(n, 1, dice), (1, k))


def fp8(n: int, k: int, dice: torch.Generator) -> ScaledMatrix:
    bits = _bytes(n, k, dice)
    bits[bits & 0x7F == 0x7F] = 0  # not a number
    scales = _random(-(-n // 128), -(-k // 128), dice)
    return ScaledMatrix((n, k), bits.view(torch.float8_e4m3fn), scales, (min(128, n), min(128, k)))


KINDS = {"int4 in groups of 128": int4, "int8 by row": int8, "fp8 in blocks of 128": fp8}


def _bytes(rows: int, columns: int, dice: torch.Generator) -> Tensor:
    return torch.randint(0, 256, (rows, columns), dtype=torch.uint8, generator=dice, device=dice.device)


def _random(rows: int, columns: int, dice: torch.Generator) -> Tensor:
    return torch.rand((rows, columns), generator=dice, device=dice.device)


def _check(
    kind: str, shapes: tuple[tuple[int, int], ...], num_rows: tuple[int, ...], device: torch.device
) -> Figures:
    """The largest error as a multiple of the tolerance, and the microseconds of stored and dense."""
    dice, weights, worst, times = torch.Generator(device).manual_seed(0), triton_kernels().weights, 0.0, {}
    for n, k in shapes:
        matrix: StoredMatrix = KINDS[kind](n, k, dice)
        dense, product = matrix.dense().to(DTYPE), weights.pack_stored([matrix], None, DTYPE)
        for rows in num_rows:
            x = torch.randn((rows, k), generator=dice, device=device).to(DTYPE)
            expected = F.linear(x.float(), dense.float())
            magnitude = x.float().abs() @ dense.float().abs().T
            excess = (product(x).float() - expected).abs() / (TOLERANCE * magnitude)
            worst = max(worst, excess.max().nan_to_num(nan=torch.inf).item())
            if device.type == "cuda":
                works = partial(product, x), partial(F.linear, x, dense)
                times[f"{n}x{k}, {rows}"] = [round(seconds_each(work, device) * 1e6, 1) for work in works]
    return {"worst_excess": worst, "us": times, "ok": worst < 1}
