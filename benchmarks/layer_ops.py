"""Measures a decoder's small operations, native and in torch, in turns: `python benchmarks/layer_ops.py`.

Sizes are SmolLM2-135M's. The last column is the cost for a step of its 30 layers.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch

from ingine.engine.kernels import native
from ingine.engine.kernels.layers.ops import LayerOps, TorchOps
from ingine.engine.kernels.native.layer_ops import NativeOps

HIDDEN_SIZE, INTERMEDIATE_SIZE, NUM_LAYERS, EPS = 576, 1536, 30, 1e-5


def operations(ops: LayerOps, num_rows: int, dtype: torch.dtype) -> list[Callable[[], object]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_rows, HIDDEN_SIZE, generator=generator).to(dtype)
    gate_up = torch.randn(num_rows, 2 * INTERMEDIATE_SIZE, generator=generator).to(dtype)
    weight, residual = torch.ones(HIDDEN_SIZE, dtype=dtype), torch.zeros_like(x)
    return [
        partial(ops.rms_norm, x, weight, EPS),
        partial(ops.add_rms_norm, residual, x, weight, EPS),
        partial(ops.silu_mul, gate_up),
    ]


def best_us(calls: list[Callable[[], object]], num_rounds: int) -> list[float]:
    """The minimum time of each call in `num_rounds` turns: other work on the machine can only add time."""
    best = [float("inf")] * len(calls)
    for _ in range(num_rounds):
        for index, call in enumerate(calls):
            call()  # warm up: the previous call used other memory
            started = time.perf_counter()
            call()
            best[index] = min(best[index], time.perf_counter() - started)
    return [1e6 * seconds for seconds in best]


def main(num_rounds: int) -> None:
    contenders = {"torch": TorchOps(), "native": NativeOps(native.library())}
    print(f"{torch.get_num_threads()} threads; us a call, least of {num_rounds}")
    print("dtype     rows  by      rms_norm  add_rms_norm  silu_mul  ms a step")
    for dtype in (torch.bfloat16, torch.float32):
        for num_rows in (1, 8, 32, 128, 512):
            calls = [call for ops in contenders.values() for call in operations(ops, num_rows, dtype)]
            times = best_us(calls, num_rounds)
            for name, (norm, add_norm, silu) in zip(contenders, (times[:3], times[3:]), strict=True):
                step_ms = NUM_LAYERS * (2 * add_norm + silu) / 1e3
                what = f"{str(dtype).removeprefix('torch.'):8} {num_rows:5}  {name:6}"
                print(f"{what} {norm:9.1f} {add_norm:13.1f} {silu:9.1f} {step_ms:10.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=300)
    with torch.inference_mode():
        main(parser.parse_args().rounds)
