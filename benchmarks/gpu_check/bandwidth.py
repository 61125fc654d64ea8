"""Measures the device's memory bandwidth, which a step's time is compared with."""

import torch

from benchmarks.gpu_check.cells import Figures
from benchmarks.gpu_check.timing import seconds_each

NUM_ROUNDS = 3


def measure_bandwidth(num_bytes: int, device: torch.device) -> Figures:
    """Bytes per second of a sum and a dot product over `num_bytes`, and of a copy of half of them.

    `bytes_per_s` is the fastest of all rounds: a lower figure would flatter the engine.
    """
    values = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)
    one, other = values.chunk(2)
    works = {
        "sum": lambda: values.sum(),
        "dot": lambda: torch.dot(one, other),
        "copy": lambda: one.copy_(other),  # reads one half, and writes the other
    }
    rates = {name: 0.0 for name in works}
    for work in works.values():
        seconds_each(work, device, repeats=2)  # loads the kernels
    for _ in range(NUM_ROUNDS):
        for name, work in works.items():
            rates[name] = max(rates[name], num_bytes / seconds_each(work, device))
    return {
        **{f"{name}_bytes_per_s": rate for name, rate in rates.items()},
        "bytes_per_s": max(rates.values()),
    }
