"""What the matrix products of a step cost: `python benchmarks/weights.py [--model NAME] [--rounds 15]`.

A model's layers and output matrix, with random weights of their own each, so that they come out of memory as
in a step. Weight formats take turns. It also says how much memory each format keeps.
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
from ingine.native.weights import NativeBfloat16, NativeInt8, is_supported

NUM_ROWS = (1, 8, 32, 64, 128, 256)


def formats() -> list[WeightFormat]:
    """All that run on this machine."""
    found: list[WeightFormat] = [PlainWeights()]
    if bfloat16_is_packable():
        found.append(PackedBfloat16())
    if int8_is_packable():
        found.append(PackedInt8())
    if (library := native.library()) is not None and is_supported(library):
        found += [NativeBfloat16(library, PlainWeights()), NativeInt8(library, PlainWeights())]
    return found


def make_linears(config: ModelConfig, weights: WeightFormat) -> list[tuple[int, Linear]]:
    """Every product of a step, with the size of its rows of x."""
    model = Decoder(config, REFERENCE, dtype=torch.bfloat16, device=torch.device("cpu"))
    linears = [(module.weight.shape[1], module) for module in model.modules() if isinstance(module, Linear)]
    for _, linear in linears:
        nn.init.normal_(linear.weight)
        linear.pack(weights)
    return linears


def step(linears: list[tuple[int, Linear]], num_rows: int) -> Callable[[], None]:
    rows: dict[int, Tensor] = {
        size: torch.randn(num_rows, size).bfloat16() for size in {size for size, _ in linears}
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
    options = parser.parse_args()

    config = ModelConfig.from_folder(resolve_model(options.model))
    models = {}
    for weights in formats():
        before = anonymous_bytes()
        models[weights.name] = make_linears(config, weights)
        num_bytes = (anonymous_bytes() - before) / 1e6
        print(f"{weights.name:12} keeps {num_bytes:6.0f} MB")
    print(
        f"\n{options.model}, {torch.get_num_threads()} threads; ms a step: least, median of {options.rounds}"
    )
    print("rows " + "".join(f"{name:>18}" for name in models))
    for num_rows in NUM_ROWS:
        calls = [step(linears, num_rows) for linears in models.values()]
        for call in calls:
            call()
        figures = (f"{t[0]:9.1f} {t[len(t) // 2]:8.1f}" for t in times_ms(calls, options.rounds))
        print(f"{num_rows:4} " + "".join(figures))


if __name__ == "__main__":
    main()
