"""Products of weights in each format: right, whatever the sizes; the native ones the same bits in any batch.

The native ones are compiled for this CPU and for older ones, which multiply by other instructions. A machine
has the plain one at least.
"""

import subprocess
import sys

import pytest
import torch

from ingine.engine.kernels.layers.int8 import quantize_rows, rotate
from ingine.engine.kernels.layers.onednn import PackedBfloat16
from ingine.engine.kernels.layers.weights import PlainWeights, WeightFormat
from ingine.engine.kernels.native.weights import NativeInt8, NativeWeights
from tests.engine.builds import library
from tests.engine.marks import EVERY_MARCH, march, needs_amx, needs_native, needs_onednn_bfloat16
from tests.paths import needs

SIZES = [(1, 4), (7, 8), (32, 36), (33, 64), (96, 576), (259, 64), (576, 1536), (50, 5000)]
NUM_ROWS = (1, 2, 3, 6, 7, 11, 12, 13, 32, 500)

# Where the native build has AMX, the build for Cooper Lake has the products of CPUs with bfloat16 alone.
COOPER_LAKE = march("cooperlake")
every_march = pytest.mark.parametrize("march", [*EVERY_MARCH, COOPER_LAKE])
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
LIBRARIES = {"plain": PlainWeights, "onednn": PackedBfloat16}
every_library = pytest.mark.parametrize(
    "name",
    [
        pytest.param("plain", marks=needs("plain torch")),
        pytest.param("onednn", marks=needs_onednn_bfloat16),
    ],
)


def make(n: int, k: int, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, k, generator=generator), torch.randn(n, generator=generator)


def random_rows(num_rows: int, k: int) -> torch.Tensor:
    return torch.randn(num_rows, k, generator=torch.Generator().manual_seed(1))


def native(march: str, dtype: torch.dtype) -> NativeWeights:
    return NativeWeights(library(march), dtype, PlainWeights())


def native_int8(march: str, dtype: torch.dtype) -> NativeInt8:
    return NativeInt8(library(march), dtype, PlainWeights())


def close(ours: torch.Tensor, exact: torch.Tensor) -> None:
    """Equal but for one rounding to the dtype of `ours`, and what sums lose of the terms that cancel."""
    rounding = {torch.bfloat16: 2**-8, torch.float32: 1e-5}[ours.dtype]
    lost = {torch.bfloat16: 1e-3, torch.float32: 1e-5}[ours.dtype] * exact.abs().mean().item()
    torch.testing.assert_close(ours.double(), exact, rtol=rounding, atol=lost)


def products_are_right(weights: WeightFormat, dtype: torch.dtype, n: int, k: int) -> None:
    weight, bias = (numbers.to(dtype) for numbers in make(n, k))
    x = random_rows(max(NUM_ROWS), k).to(dtype)
    exact = x.double() @ weight.double().T
    product, with_bias = weights.pack(weight, None), weights.pack(weight, bias)
    for rows in NUM_ROWS:
        close(product(x[:rows]), exact[:rows])
        close(with_bias(x[:rows]), exact[:rows] + bias.double())


@every_march
@every_dtype
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_native_products_are_right(march, dtype, n, k):
    products_are_right(native(march, dtype), dtype, n, k)


@every_library
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_products_of_libraries_are_right(name, n, k):
    products_are_right(LIBRARIES[name](), torch.bfloat16, n, k)


@every_march
@every_dtype
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_int8_products_are_those_of_the_quantised_numbers(march, dtype, n, k):
    weight, bias = (numbers.to(dtype) for numbers in make(n, k))
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(-255, 256, (max(NUM_ROWS), k), generator=generator).to(dtype)
    x /= 64  # is rotated without rounding, in any order
    w_scales, w_rows = quantize_rows(weight)
    rotated = rotate(x)
    largest = rotated.abs().amax(dim=1, keepdim=True)
    # `127 / largest` would be torch's reciprocal times 127, which rounds some ties the other way.
    x_rows = (rotated * torch.full_like(largest, 127).div(largest)).round()
    x_scales = (largest / 127)[:, 0]
    exact = (x_rows.double() @ w_rows.double().T) * x_scales.double()[:, None] * w_scales.double()
    rounding, lost = (2**-8, 1e-5 * k) if dtype == torch.bfloat16 else (1e-6, 1e-6)
    product = native_int8(march, dtype).pack(weight, bias)
    for rows in NUM_ROWS:
        ours = product(x[:rows]).double()
        torch.testing.assert_close(ours, exact[:rows] + bias.double(), rtol=rounding, atol=lost)


@every_march
def test_int8_sums_do_not_overflow_where_all_numbers_are_the_largest(march):
    weight, x = torch.ones(40, 8192), torch.ones(7, 8192)
    weight[::2] = -1
    x[:, 1::2] = -1
    weight[:, 1::2] *= -1  # every product is of one sign
    ours = native_int8(march, torch.float32).pack(weight, None)(x)
    torch.testing.assert_close(ours, x @ weight.T, rtol=1e-5, atol=0)


NATIVE = {
    "float32": (torch.float32, native),
    "bfloat16": (torch.bfloat16, native),
    "int8": (torch.bfloat16, native_int8),
    "int8, float32": (torch.float32, native_int8),
}
every_native = pytest.mark.parametrize("name", NATIVE)


@every_march
@every_native
def test_a_row_of_zeros_is_zero(march, name):
    dtype, make_weights = NATIVE[name]
    weight = make(40, 64)[0].to(dtype)
    weight[3] = 0
    x = torch.zeros(2, 64, dtype=dtype)
    x[1] = 1
    out = make_weights(march, dtype).pack(weight, None)(x)
    assert out[0].eq(0).all() and out[1, 3] == 0 and out[1].ne(0).any()


@every_march
@every_native
def test_a_row_gives_the_same_bits_in_any_batch(march, name):
    dtype, make_weights = NATIVE[name]
    weight, bias = make(960, 576)
    product = make_weights(march, dtype).pack(weight.to(dtype), bias.to(dtype))
    x = random_rows(530, 576).to(dtype)
    whole = product(x)
    for rows in (1, 2, 3, 5, 6, 7, 12, 16, 17, 32, 33, 48, 49, 100, 481):
        assert torch.equal(product(x[:rows]), whole[:rows])
        assert torch.equal(product(x[-rows:].contiguous()), whole[-rows:])


@every_march
@every_native
def test_a_row_gives_the_same_bits_with_any_number_of_threads(march, name):
    dtype, make_weights = NATIVE[name]
    product = make_weights(march, dtype).pack(make(200, 5000)[0].to(dtype), None)
    x = random_rows(14, 5000).to(dtype)
    expected, num_threads = product(x), torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(product(x), expected)
    finally:
        torch.set_num_threads(num_threads)


@every_march
@every_native
def test_what_is_not_finite_stays_in_its_row(march, name):
    dtype, make_weights = NATIVE[name]
    product = make_weights(march, dtype).pack(make(64, 64)[0].to(dtype), None)
    x = random_rows(4, 64).to(dtype)
    expected = product(x)
    x[1, 5], x[2, 6] = torch.nan, torch.inf
    out = product(x)
    assert not out[[1, 2]].isfinite().any()
    assert torch.equal(out[[0, 3]], expected[[0, 3]])


def rows_can_be_had(weights: WeightFormat, dtype: torch.dtype) -> None:
    weight = make(259, 64)[0].to(dtype)
    expected = weight.clone()
    product, embedding = weights.pack_tied(weight)
    token_ids = torch.tensor([0, 258, 31, 32, 32, 100])
    assert torch.equal(embedding(token_ids), expected[token_ids])
    x = random_rows(2, 64).to(dtype)
    close(product(x), x.double() @ expected.double().T)


@every_dtype
@needs_native
def test_rows_can_be_had_out_of_the_packed_matrix(dtype):
    rows_can_be_had(native("native", dtype), dtype)


@every_library
def test_rows_can_be_had_out_of_what_a_library_packed(name):
    rows_can_be_had(LIBRARIES[name](), torch.bfloat16)


@needs_native
def test_sizes_that_do_not_fit_are_multiplied_all_the_same():
    weight, bias = (numbers.bfloat16() for numbers in make(20, 63))
    x = random_rows(3, 63).bfloat16()
    for weights in (native("native", torch.bfloat16), native_int8("native", torch.bfloat16)):
        assert torch.equal(weights.pack(weight, bias)(x), torch.nn.functional.linear(x, weight, bias))


@needs_native
def test_float32_takes_any_size():
    products_are_right(native("native", torch.float32), torch.float32, 20, 63)
    rows = native("native", torch.float32).pack_tied(make(20, 63)[0])[1]
    assert torch.equal(rows(torch.tensor([19])), make(20, 63)[0][19:])


@pytest.mark.parametrize(
    ("march", "isas"),
    [
        pytest.param(*COOPER_LAKE.values, ("avx512", "avx512-bf16", "avx512-vnni"), marks=COOPER_LAKE.marks),
        pytest.param("x86-64-v4", ("avx512", "avx512", "avx512"), marks=[*EVERY_MARCH[1].marks]),
        pytest.param("alderlake", ("avx2", "avx2", "avx-vnni"), marks=[*EVERY_MARCH[2].marks]),
        pytest.param("x86-64-v3", ("avx2", "avx2", "avx2"), marks=[*EVERY_MARCH[3].marks]),
        pytest.param("x86-64", ("sse2", "sse2", "sse2"), marks=[*EVERY_MARCH[4].marks]),
    ],
)
def test_the_names_say_which_instructions_multiply(march, isas):
    f32, bf16 = (native(march, dtype).name for dtype in (torch.float32, torch.bfloat16))
    int8 = native_int8(march, torch.bfloat16).name
    assert (f32, bf16, int8) == tuple(
        f"native-{name} ({isa})" for name, isa in zip(("f32", "bf16", "int8"), isas, strict=True)
    )


SHOW_INSTRUCTIONS = """
import ctypes, sys
from ingine.engine.kernels import native
from ingine.engine.kernels.native.compiler import build

class Stack(ctypes.Structure):
    _fields_ = [("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]

memory = ctypes.create_string_buffer(int(sys.argv[1]))
stack = Stack(ctypes.addressof(memory), 0, len(memory))
assert ctypes.CDLL(None).sigaltstack(ctypes.byref(stack), None) == 0
isa = native.load(build()).ingine_linear_isa
isa.restype = ctypes.c_char_p
print(isa(ctypes.c_int64(2)).decode(), isa(ctypes.c_int64(1)).decode())
"""


@needs_amx
@pytest.mark.parametrize(
    ("signal_stack", "isas"),
    [(64 << 10, ["amx-bf16", "amx-int8"]), (8 << 10, ["avx512-bf16", "avx512-vnni"])],
)
def test_amx_multiplies_where_the_system_allows_it(signal_stack, isas):
    """A process whose stack for signals has no room for tiles is refused them."""
    library("native")
    command = [sys.executable, "-c", SHOW_INSTRUCTIONS, str(signal_stack)]
    assert subprocess.check_output(command, text=True).split() == isas


@pytest.mark.parametrize("march", EVERY_MARCH[1:4])
@pytest.mark.parametrize("name", ["float32", "int8, float32"])
def test_builds_with_fused_multiplication_give_each_others_bits(march, name):
    """So in float32, a worker that resumes a job on another kind of CPU computes the same."""
    dtype, make_weights = NATIVE[name]
    weight, bias = make(96, 576)
    x = random_rows(13, 576)
    ours = make_weights(march, dtype).pack(weight, bias)(x)
    assert torch.equal(ours, make_weights("x86-64-v3", dtype).pack(weight, bias)(x))
