"""Percentiles of a few numbers."""

import math
from collections.abc import Sequence


def percentile(values: Sequence[float], percent: float) -> float:
    """The percentile by nearest rank: the smallest value that `percent` % of `values` do not exceed.

    Raises IndexError without values.
    """
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]
