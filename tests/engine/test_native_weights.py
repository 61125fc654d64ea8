"""Products of packed weights: right, whatever the sizes, and the same bits in any batch."""

import pytest
import torch

from ingine import native
from ingine.layers.int8 import quantize_rows, rotate
from ingine.layers.weights import PlainWeights
from ingine.native.weights import NativeBfloat16, NativeInt8
from tests.engine.marks import needs_native_weights

library = native.library()
pytestmark = needs_native_weights

SIZES = [(1, 4), (7, 8), (32, 36), (33, 64), (96, 576), (259, 64), (576, 1536), (50, 5000)]


def make(n: int, k: int, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator, dtype=torch.float32)
    return weight.bfloat16(), torch.randn(n, generator=generator).bfloat16()


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16()


def bfloat16_close(ours: torch.Tensor, exact: torch.Tensor) -> None:
    """Equal but for one rounding to bfloat16, and what float32 sums lose of the terms that cancel."""
    torch.testing.assert_close(ours.double(), exact, rtol=2**-8, atol=1e-3 * exact.abs().mean().item())


@pytest.mark.parametrize("rows", [1, 2, 11, 12, 13, 32, 500])
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_bfloat16_products_are_right(n, k, rows):
    weight, bias = make(n, k)
    x = draw(rows, k)
    exact = x.double() @ weight.double().T
    weights = NativeBfloat16(library, PlainWeights())
    bfloat16_close(weights.pack(weight, None)(x), exact)
    bfloat16_close(weights.pack(weight, bias)(x), exact + bias.double())


@pytest.mark.parametrize("rows", [1, 12, 13, 32, 500])
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_int8_products_are_those_of_the_quantised_numbers(n, k, rows):
    weight, bias = make(n, k)
    generator = torch.Generator().manual_seed(1)
    integers = torch.randint(-255, 256, (rows, k), generator=generator)
    x = integers.bfloat16() / 64  # rotated without rounding, in any order
    w_scales, w_rows = quantize_rows(weight)
    rotated = rotate(x)
    largest = rotated.abs().amax(dim=1, keepdim=True)
    # `127 / largest` would be torch's reciprocal times 127, which rounds some ties the other way.
    x_rows = (rotated * torch.full_like(largest, 127).div(largest)).round()
    x_scales = (largest / 127)[:, 0]
    exact = (x_rows.double() @ w_rows.double().T) * x_scales.double()[:, None] * w_scales.double()
    ours = NativeInt8(library, PlainWeights()).pack(weight, bias)(x)
    torch.testing.assert_close(ours.double(), exact + bias.double(), rtol=2**-8, atol=1e-5 * k)


def test_a_row_of_zeros_is_zero():
    weight, _ = make(40, 64)
    weight[3] = 0
    x = torch.zeros(2, 64, dtype=torch.bfloat16)
    x[1] = 1
    for weights in (NativeBfloat16(library, PlainWeights()), NativeInt8(library, PlainWeights())):
        out = weights.pack(weight, None)(x)
        assert out[0].eq(0).all() and out[1, 3] == 0 and out[1].ne(0).any()


@pytest.mark.parametrize("weights", [NativeBfloat16, NativeInt8])
def test_a_row_gives_the_same_bits_in_any_batch(weights):
    weight, _ = make(960, 576)
    product = weights(library, PlainWeights()).pack(weight, None)
    x = draw(530, 576)
    whole = product(x)
    for rows in (1, 5, 12, 32, 100, 481):
        assert torch.equal(product(x[:rows]), whole[:rows])
        assert torch.equal(product(x[-rows:].contiguous()), whole[-rows:])


@pytest.mark.parametrize("weights", [NativeBfloat16, NativeInt8])
def test_what_is_not_finite_stays_in_its_row(weights):
    weight, _ = make(64, 64)
    product = weights(library, PlainWeights()).pack(weight, None)
    x = draw(3, 64)
    expected = product(x)
    x[1, 5] = torch.nan
    out = product(x)
    assert not out[1].isfinite().any()
    assert torch.equal(out[[0, 2]], expected[[0, 2]])


def test_rows_can_be_had_out_of_the_packed_matrix():
    weight, _ = make(259, 64)
    product, embedding = NativeBfloat16(library, PlainWeights()).pack_tied(weight)
    token_ids = torch.tensor([0, 258, 31, 32, 32, 100])
    assert torch.equal(embedding(token_ids), weight[token_ids])
    x = draw(2, 64)
    bfloat16_close(product(x), x.double() @ weight.double().T)


def test_sizes_that_do_not_fit_are_multiplied_all_the_same():
    weight, bias = make(20, 63)
    x = draw(3, 63)
    for weights in (NativeBfloat16(library, PlainWeights()), NativeInt8(library, PlainWeights())):
        assert torch.equal(weights.pack(weight, bias)(x), torch.nn.functional.linear(x, weight, bias))
