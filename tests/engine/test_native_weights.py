"""Products of weights in each format: right, whatever the sizes; the native ones the same bits in any batch.

A machine has the plain one at least.
"""

import pytest
import torch

from ingine.layers.int8 import quantize_rows, rotate
from ingine.layers.onednn import PackedBfloat16
from ingine.layers.weights import PlainWeights, WeightFormat
from ingine.native.weights import NativeBfloat16, NativeInt8
from tests.engine.builds import library
from tests.engine.marks import needs_native_weights, needs_onednn_bfloat16
from tests.paths import needs

BFLOAT16 = [
    pytest.param("native", marks=needs_native_weights),
    pytest.param("onednn", marks=needs_onednn_bfloat16),
    pytest.param("plain", marks=needs("plain torch")),
]
SIZES = [(1, 4), (7, 8), (32, 36), (33, 64), (96, 576), (259, 64), (576, 1536), (50, 5000)]


def make(n: int, k: int, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator, dtype=torch.float32)
    return weight.bfloat16(), torch.randn(n, generator=generator).bfloat16()


def random_rows(num_rows: int, k: int) -> torch.Tensor:
    return torch.randn(num_rows, k, generator=torch.Generator().manual_seed(1)).bfloat16()


def bfloat16_close(ours: torch.Tensor, exact: torch.Tensor) -> None:
    """Equal but for one rounding to bfloat16, and what float32 sums lose of the terms that cancel."""
    torch.testing.assert_close(ours.double(), exact, rtol=2**-8, atol=1e-3 * exact.abs().mean().item())


def bfloat16(name: str) -> WeightFormat:
    if name == "native":
        return NativeBfloat16(library(), PlainWeights())
    return {"onednn": PackedBfloat16, "plain": PlainWeights}[name]()


def int8() -> NativeInt8:
    return NativeInt8(library(), PlainWeights())


@pytest.mark.parametrize("name", BFLOAT16)
@pytest.mark.parametrize("rows", [1, 2, 11, 12, 13, 32, 500])
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_bfloat16_products_are_right(name, n, k, rows):
    weight, bias = make(n, k)
    x = random_rows(rows, k)
    exact = x.double() @ weight.double().T
    weights = bfloat16(name)
    bfloat16_close(weights.pack(weight, None)(x), exact)
    bfloat16_close(weights.pack(weight, bias)(x), exact + bias.double())


@needs_native_weights
@pytest.mark.parametrize("rows", [1, 12, 13, 32, 500])
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_int8_products_are_those_of_the_quantised_numbers(n, k, rows):
    weight, bias = make(n, k)
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(-255, 256, (rows, k), generator=generator).bfloat16()
    x /= 64  # is rotated without rounding, in any order
    w_scales, w_rows = quantize_rows(weight)
    rotated = rotate(x)
    largest = rotated.abs().amax(dim=1, keepdim=True)
    # `127 / largest` would be torch's reciprocal times 127, which rounds some ties the other way.
    x_rows = (rotated * torch.full_like(largest, 127).div(largest)).round()
    x_scales = (largest / 127)[:, 0]
    exact = (x_rows.double() @ w_rows.double().T) * x_scales.double()[:, None] * w_scales.double()
    ours = int8().pack(weight, bias)(x)
    torch.testing.assert_close(ours.double(), exact + bias.double(), rtol=2**-8, atol=1e-5 * k)


ALL = [*BFLOAT16, pytest.param("int8", marks=needs_native_weights)]


def format_of(name: str) -> WeightFormat:
    return int8() if name == "int8" else bfloat16(name)


@pytest.mark.parametrize("name", ALL)
def test_a_row_of_zeros_is_zero(name):
    weight, _ = make(40, 64)
    weight[3] = 0
    x = torch.zeros(2, 64, dtype=torch.bfloat16)
    x[1] = 1
    out = format_of(name).pack(weight, None)(x)
    assert out[0].eq(0).all() and out[1, 3] == 0 and out[1].ne(0).any()


@needs_native_weights
@pytest.mark.parametrize("name", ["native", "int8"])
def test_a_row_gives_the_same_bits_in_any_batch(name):
    weight, _ = make(960, 576)
    product = format_of(name).pack(weight, None)
    x = random_rows(530, 576)
    whole = product(x)
    for rows in (1, 5, 12, 32, 100, 481):
        assert torch.equal(product(x[:rows]), whole[:rows])
        assert torch.equal(product(x[-rows:].contiguous()), whole[-rows:])


@pytest.mark.parametrize("name", ALL)
def test_what_is_not_finite_stays_in_its_row(name):
    weight, _ = make(64, 64)
    product = format_of(name).pack(weight, None)
    x = random_rows(3, 64)
    expected = product(x)
    x[1, 5] = torch.nan
    out = product(x)
    assert not out[1].isfinite().any()
    assert torch.equal(out[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("name", BFLOAT16)
def test_rows_can_be_had_out_of_the_packed_matrix(name):
    weight, _ = make(259, 64)
    expected = weight.clone()
    product, embedding = bfloat16(name).pack_tied(weight)
    token_ids = torch.tensor([0, 258, 31, 32, 32, 100])
    assert torch.equal(embedding(token_ids), expected[token_ids])
    x = random_rows(2, 64)
    bfloat16_close(product(x), x.double() @ weight.double().T)


@needs_native_weights
def test_sizes_that_do_not_fit_are_multiplied_all_the_same():
    weight, bias = make(20, 63)
    x = random_rows(3, 63)
    for weights in (bfloat16("native"), int8()):
        assert torch.equal(weights.pack(weight, bias)(x), torch.nn.functional.linear(x, weight, bias))
