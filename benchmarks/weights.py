"""Measures the matrix products of a step: `python benchmarks/weights.py [--model NAME] [--rounds 15]`.

It multiplies a model's layers and output matrix, or with `--matrix 18944x3584` matrices of given sizes. Each
has random weights of its own, which are read from memory as in a step. Weight formats take turns. Formats
with blocks are stored row by row, as in a GGUF file; a format whose blocks do not divide a matrix is left
out. It also prints the memory of each format.

A newer CPU does what an older one would with `--march x86-64-v3` and, for torch, ATEN_CPU_CAPABILITY=avx2. On
a machine with other work use one thread (OMP_NUM_THREADS=1) and `--processor-time`.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ingine.engine.kernels import native
from ingine.engine.kernels.layers.linear import Linear
from ingine.engine.kernels.layers.onednn import (
    PackedBfloat16,
    PackedInt8,
    bfloat16_is_packable,
    int8_is_packable,
)
from ingine.engine.kernels.layers.stored import StoredMatrix
from ingine.engine.kernels.layers.weights import PlainWeights, Product, WeightFormat
from ingine.engine.kernels.native.compiler import build
from ingine.engine.kernels.native.weights import NativeInt8, NativeWeights
from ingine.engine.kernels.select import REFERENCE
from ingine.engine.models.config import ModelConfig
from ingine.engine.models.decoder import Decoder
from ingine.engine.store.model_store import DEFAULT_MODEL, resolve_model
from tests.engine.stored_matrices import BLOCK_SIZES, gguf_matrix, int4_matrix

NUM_ROWS = (1, 8, 32, 64, 128, 480)
INT4_GROUPS = (32, 128)

Shape = tuple[int, int]
"""Number of outputs and inputs."""


@dataclass(frozen=True)
class Format:
    name: str
    dtype: torch.dtype
    """Type of the rows."""
    pack: Callable[[Shape], Product]
    weight_bits: float
    block_size: int = 1


def formats(march: str) -> list[Format]:
    """All formats that run on this machine."""
    float32, bfloat16, plain = torch.float32, torch.bfloat16, PlainWeights()
    library = native.load(build(march))
    blocks = NativeWeights(library, bfloat16, plain)
    return [
        dense("plain-f32", plain, float32, 32),
        dense("plain-bf16", plain, bfloat16, 16),
        *([dense("onednn-bf16", PackedBfloat16(), bfloat16, 16)] if bfloat16_is_packable() else []),
        *([dense("onednn-int8", PackedInt8(), bfloat16, 8)] if int8_is_packable() else []),
        dense("native-f32", NativeWeights(library, float32, plain), float32, 32),
        dense("native-bf16", blocks, bfloat16, 16),
        dense("native-int8", NativeInt8(library, bfloat16, plain), bfloat16, 8),
        *(
            stored(kind.name.lower(), blocks, partial(gguf_matrix, kind), 8 * num_bytes / size, size)
            for kind, (size, num_bytes) in BLOCK_SIZES.items()
        ),
        *(
            stored(f"int4-g{size}", blocks, partial(int4_matrix, group_size=size), 4 + 32 / size, size)
            for size in INT4_GROUPS
        ),
    ]


def dense(name: str, weights: WeightFormat, dtype: torch.dtype, weight_bits: float) -> Format:
    return Format(name, dtype, lambda shape: weights.pack(torch.randn(shape, dtype=dtype), None), weight_bits)


def stored(
    name: str, weights: WeightFormat, make: Callable[..., StoredMatrix], weight_bits: float, block_size: int
) -> Format:
    def pack(shape: Shape) -> Product:
        return weights.pack_stored([make(*shape)], None, torch.bfloat16)

    return Format(name, torch.bfloat16, pack, weight_bits, block_size)


def shapes_of(config: ModelConfig) -> list[Shape]:
    """The shapes of all products of a step."""
    model = Decoder(config, REFERENCE, dtype=torch.bfloat16, device=torch.device("meta"))
    linears = [module for module in model.modules() if isinstance(module, Linear)]
    return [(sum(linear.out_features), linear.weight.shape[1]) for linear in linears]


def step(products: list[tuple[Shape, Product]], dtype: torch.dtype, num_rows: int) -> Callable[[], None]:
    rows: dict[int, Tensor] = {
        size: torch.randn(num_rows, size, dtype=dtype) for size in {shape[1] for shape, _ in products}
    }

    def run() -> None:
        for shape, product in products:
            product(rows[shape[1]])

    return run


def times_s(
    calls: list[Callable[[], None]], num_rounds: int, clock: Callable[[], float]
) -> list[list[float]]:
    """The sorted times of each call in `num_rounds` turns, in seconds."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(num_rounds):
        for call, taken in zip(calls, times, strict=True):
            started = clock()
            call()
            taken.append(clock() - started)
    return [sorted(taken) for taken in times]


def anonymous_bytes() -> int:
    """Anonymous memory of this process; 0 without /proc."""
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))
    except FileNotFoundError:
        return 0


def shape(text: str) -> Shape:
    out_features, in_features = text.split("x")
    return int(out_features), int(in_features)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--matrix", nargs="*", type=shape, metavar="OUTxIN", help="instead of a model's")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rows", nargs="*", type=int, default=NUM_ROWS)
    parser.add_argument("--march", default="native", help="what the native kernels are compiled for")
    parser.add_argument("--only", nargs="*", metavar="FORMAT", help="such as native-bf16; all if not given")
    parser.add_argument("--processor-time", action="store_true", help="of the one thread, not wall time")
    options = parser.parse_args()

    shapes = options.matrix or shapes_of(ModelConfig.from_folder(resolve_model(options.model)))
    packed: list[tuple[Format, list[tuple[Shape, Product]]]] = []
    for form in formats(options.march):
        if options.only and form.name not in options.only:
            continue
        if any(in_features % form.block_size for _, in_features in shapes):
            print(f"{form.name:12} does not divide these matrices")
            continue
        before = anonymous_bytes()
        packed.append((form, [(size, form.pack(size)) for size in shapes]))
        print(f"{form.name:12} keeps {(anonymous_bytes() - before) / 1e6:6.0f} MB")
    print(
        f"\n{options.matrix or options.model}, {torch.get_num_threads()} threads; of {options.rounds} steps: "
        "ms of the fastest, median ms; its GB/s of weights, GFLOP/s"
    )
    num_weights = sum(out_features * in_features for out_features, in_features in shapes)
    clock = time.thread_time if options.processor_time else time.perf_counter
    for num_rows in options.rows:
        calls = [step(products, form.dtype, num_rows) for form, products in packed]
        for call in calls:
            call()
        for (form, _), taken in zip(packed, times_s(calls, options.rounds, clock), strict=True):
            median = taken[len(taken) // 2]
            print(
                f"{num_rows:4} rows  {form.name:12}{1e3 * taken[0]:10.2f}{1e3 * median:10.2f}"
                f"{1e-9 * num_weights * form.weight_bits / 8 / median:8.1f}"
                f"{2e-9 * num_weights * num_rows / median:8.0f}"
            )


if __name__ == "__main__":
    main()
