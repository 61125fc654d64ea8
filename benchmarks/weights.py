"""What the matrix products of a step cost: `python benchmarks/weights.py [--model NAME] [--rounds 15]`.

A model's layers and output matrix, with random weights of their own each, so that they come out of memory as
in a step. Weight formats take turns. It also says how much memory each format keeps.

A newer CPU does what an older one would with `--march x86-64-v3` and, for torch, ATEN_CPU_CAPABILITY=avx2.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ingine import native
from ingine.kernels import REFERENCE
from ingine.layers.linear import Linear
from ingine.layers.onednn import PackedBfloat16, PackedInt8, bfloat16_is_packable, int8_is_packable
from ingine.layers.weights import PlainWeights, WeightFormat
from ingine.model_store import DEFAULT_MODEL, resolve_model
from ingine.models import Decoder, ModelConfig
from ingine.native.compiler import build
from ingine.native.weights import NativeInt8, NativeWeights

NUM_ROWS = (1, 8, 32, 64, 128, 256)


def formats(march: str) -> dict[str, tuple[WeightFormat, torch.dtype]]:
    """All that run on this machine, each with the dtype of its rows."""
    plain, bfloat16 = PlainWeights(), torch.bfloat16
    found: list[tuple[WeightFormat, torch.dtype]] = [(plain, torch.float32), (plain, bfloat16)]
    if bfloat16_is_packable():
        found.append((PackedBfloat16(), bfloat16))
    if int8_is_packable():
        found.append((PackedInt8(), bfloat16))
    library = native.load(build(march))
    found += [(NativeWeights(library, dtype, plain), dtype) for dtype in (torch.float32, bfloat16)]
    found.append((NativeInt8(library, bfloat16, plain), bfloat16))
    names = {torch.float32: "f32", bfloat16: "bf16"}
    return {
        f"{weights.name}-{names[dtype]}" if weights is plain else weights.name.split()[0]: (weights, dtype)
        for weights, dtype in found
    }


def make_linears(config: ModelConfig, weights: WeightFormat, dtype: torch.dtype) -> list[tuple[int, Linear]]:
    """Every product of a step, with the size of its rows of x."""
    model = Decoder(config, REFERENCE, dtype=dtype, device=torch.device("cpu"))
    linears = [(module.weight.shape[1], module) for module in model.modules() if isinstance(module, Linear)]
    for _, linear in linears:
        nn.init.normal_(linear.weight)
        linear.pack(weights)
    return linears


def step(linears: list[tuple[int, Linear]], dtype: torch.dtype, num_rows: int) -> Callable[[], None]:
    rows: dict[int, Tensor] = {
        size: torch.randn(num_rows, size, dtype=dtype) for size in {size for size, _ in linears}
    }

    def run() -> None:
        for size, linear in linears:
            linear(rows[size])

    return run


def times_ms(calls: list[Callable[[], None]], num_rounds: int) -> list[list[float]]:
    """Sorted, of each call, in `num_rounds` turns."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(num_rounds):
        for call, taken in zip(calls, times, strict=True):
            started = time.perf_counter()
            call()
            taken.append(1e3 * (time.perf_counter() - started))
    return [sorted(taken) for taken in times]


def anonymous_bytes() -> int:
    """Memory of this process that is no file's; 0 where there is no /proc."""
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))
    except FileNotFoundError:
        return 0


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--march", default="native", help="what the native kernels are compiled for")
    parser.add_argument("--only", nargs="*", metavar="FORMAT", help="such as native-bf16; all if not given")
    options = parser.parse_args()

    config = ModelConfig.from_folder(resolve_model(options.model))
    models = {}
    for name, (weights, dtype) in formats(options.march).items():
        if options.only and name not in options.only:
            continue
        before = anonymous_bytes()
        models[name] = make_linears(config, weights, dtype), dtype
        num_bytes = (anonymous_bytes() - before) / 1e6
        print(f"{name:12} ({weights.name}) keeps {num_bytes:6.0f} MB")
    print(
        f"\n{options.model}, {torch.get_num_threads()} threads; of {options.rounds} steps: "
        "ms of the fastest, median ms, its GFLOP/s"
    )
    print("rows " + "".join(f"{name:>27}" for name in models))
    some_linears, _ = next(iter(models.values()))
    products = sum(size * sum(linear.out_features) for size, linear in some_linears)
    for num_rows in NUM_ROWS:
        calls = [step(linears, dtype, num_rows) for linears, dtype in models.values()]
        for call in calls:
            call()
        times = [(t[0], t[len(t) // 2]) for t in times_ms(calls, options.rounds)]
        mflop = 2e-6 * products * num_rows
        figures = (f"{least:10.1f} {median:8.1f} {mflop / median:7.0f}" for least, median in times)
        print(f"{num_rows:4} " + "".join(figures))


if __name__ == "__main__":
    main()
