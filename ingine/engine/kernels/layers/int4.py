"""Quantises weights to codes of four bits, with the scale and zero of least error for each group of columns.

A range that reaches the largest number of a group would make the steps too wide for the other numbers. So
several narrower ranges are tried, whose ends clamp, and for each the line through the codes that fits the
group best.
"""

from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from ingine.engine.kernels.layers.stored import Int4Matrix

GROUP_SIZE = 32
"""Number of columns that share a scale and a zero, so a weight takes five bits."""

LARGEST_CODE = 15

LARGEST_ZERO = 64
"""Largest magnitude of a zero, up to which float16 is exact to a 64th of a step."""

LEAST_COST = 0.01
"""Added to every column's cost, whose mean is 1: a column that measured as unimportant may still matter."""

ENDS = (1.0, 0.92, 0.84)
"""The ends of a range, as fractions of a group's least and largest number. All pairs are tried."""

NUM_REFITS = 2
"""Number of times that codes are computed from the best line, and a new line from these codes."""

PART = 1 << 18
"""Number of weights that are quantised at a time, so that they stay in a core's cache."""


def can_be_int4(columns: int) -> bool:
    return columns % GROUP_SIZE == 0


def quantize_int4(
    weight: Tensor, group_size: int = GROUP_SIZE, *, importance: Tensor | None = None
) -> Int4Matrix:
    """Quantise weight [rows, columns]. columns is a multiple of `group_size`, which is a power of two.

    importance [columns]: the cost of a squared error in each column, not negative; None: all columns cost the
    same.

    The result has the same bits on every machine: each step is an IEEE operation on float32 in a fixed order,
    or a sum of whole numbers. A group that has a number which is not finite becomes NaN.
    """
    rows, columns = weight.shape
    per_row = columns // group_size
    codes = torch.empty(rows, columns // 2, dtype=torch.uint8)
    scales, zeros = (torch.empty(rows, per_row, dtype=torch.float16) for _ in range(2))
    of_columns = _costs(importance, columns).view(-1, group_size).T  # [group_size, groups of a row]
    rows_a_part = max(PART // columns, 1)
    parts = zip(*(tensor.split(rows_a_part) for tensor in (weight, codes, scales, zeros)), strict=True)
    for weight_part, codes_part, scales_part, zeros_part in parts:
        groups = weight_part.float().reshape(-1, group_size).T.contiguous()  # [group_size, groups]
        costs = of_columns.repeat(1, len(weight_part))
        scale, zero = _fit(groups, costs)
        scales_part.copy_(scale.view(-1, per_row))
        zeros_part.copy_(zero.view(-1, per_row))
        numbers = _codes(groups, scale, zero).T.reshape(-1, columns).to(torch.uint8)
        codes_part.copy_(numbers[:, ::2] | numbers[:, 1::2] << 4)
    return Int4Matrix((rows, columns), codes, scales, zeros)


def _costs(importance: Tensor | None, columns: int) -> Tensor:
    """Return the cost of an error in each column, float32 [columns]: 1 on average, and all above 0."""
    if importance is None:
        return torch.ones(columns)
    importance = importance.double()
    next_power = 1 << (columns - 1).bit_length()
    costs = (importance * columns / _sum(F.pad(importance, (0, next_power - columns)))).float()
    return costs.add_(LEAST_COST) if costs.isfinite().all() else torch.ones(columns)


def _fit(groups: Tensor, costs: Tensor) -> tuple[Tensor, Tensor]:
    """Fit groups with costs, both [group_size, n]. Returns scales and zeros [n], float32 that fit float16."""
    # The range includes 0, so the zero of a line that has not been fitted is one of the codes.
    least, largest = groups.amin(dim=0).clamp_(max=0), groups.amax(dim=0).clamp_(min=0)
    total = _sum(costs)
    mean = _sum(groups * costs) / total
    centred = groups - mean
    best = _Line((largest - least) / LARGEST_CODE, least, torch.zeros_like(mean))

    def try_out(scale: Tensor, min: Tensor) -> None:
        best.replace_by(_line(groups, costs, total, mean, centred, scale, min))

    for low, high in product(ENDS, ENDS):
        start = least * low
        try_out((largest * high - start) / LARGEST_CODE, start)
    for _ in range(NUM_REFITS):
        try_out(best.scale, best.min)
    scale = best.scale.half().float()
    return scale, _or_zero(-best.min / scale, scale).half().float()


class _Line:
    """The line code * scale + min of each group, and how much of the group's variance it explains."""

    def __init__(self, scale: Tensor, min: Tensor, explained: Tensor):
        self.scale, self.min, self.explained = scale, min, explained

    def replace_by(self, other: "_Line") -> None:
        is_better = other.explained > self.explained
        self.scale = torch.where(is_better, other.scale, self.scale)
        self.min = torch.where(is_better, other.min, self.min)
        self.explained = torch.where(is_better, other.explained, self.explained)


def _line(
    groups: Tensor, costs: Tensor, total: Tensor, mean: Tensor, centred: Tensor, scale: Tensor, min: Tensor
) -> _Line:
    """Fit a line by weighted least squares to the codes that the groups have with `scale` and `min`."""
    codes = _codes(groups, scale, _or_zero(-min / scale, scale))
    code_mean = _sum(codes * costs) / total
    codes.sub_(code_mean)
    weighted = codes * costs
    spread, covariance = _sum(codes.mul_(weighted)), _sum(weighted.mul_(centred))
    fitted = covariance / spread
    fitted_min = mean - fitted * code_mean
    is_sound = (spread > 0) & (fitted_min.abs() <= LARGEST_ZERO * fitted)
    return _Line(fitted, fitted_min, torch.where(is_sound, covariance * fitted, 0))


def _codes(groups: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Return the codes as float32. A group whose scale is not positive, or not finite, has codes of 0."""
    inverse = _or_zero(1 / scale, scale)
    return (groups * inverse).add_(zero).round_().clamp_(0, LARGEST_CODE).nan_to_num_(0)


def _or_zero(x: Tensor, scale: Tensor) -> Tensor:
    return torch.where(scale > 0, x, 0)


def _sum(x: Tensor) -> Tensor:
    """Sum over the first dimension, whose size is a power of two, in an order that no library chooses."""
    while len(x) > 1:
        half = len(x) // 2
        x = x[:half] + x[half:]
    return x[0]
