"""int8 weights of a checkpoint made for activations in int8 (W8A8), on a CPU: they stay as they are."""

import pytest
import torch

from ingine.engine.kernels.layers.stored import ScaledMatrix
from ingine.engine.kernels.layers.weights import WeightFormat
from tests.engine.marks import EVERY_MARCH
from tests.engine.test_native_weights import NUM_ROWS, close, native, native_int8, random_rows

every_format = pytest.mark.parametrize("make_weights", [native, native_int8])
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def w8a8(n: int, k: int, seed: int = 0) -> ScaledMatrix:
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=generator)
    return ScaledMatrix(
        (n, k), numbers, torch.rand((n, 1), generator=generator), (1, k), int8_activations=True
    )


def activations_in_int8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round each token as compressed-tensors does: symmetric, with a scale per row."""
    largest = x.float().abs().amax(dim=1, keepdim=True)
    return (x.float() * torch.full_like(largest, 127).div(largest)).round(), largest / 127


@pytest.mark.parametrize("march", EVERY_MARCH)
@every_format
@every_dtype
@pytest.mark.parametrize("k", [64, 36, 576])
def test_the_product_is_that_of_the_stored_numbers_and_of_each_row_in_int8(march, make_weights, dtype, k):
    parts, bias = [w8a8(40, k), w8a8(33, k, seed=1)], random_rows(1, 73)[0].to(dtype)
    x = random_rows(max(NUM_ROWS), k).to(dtype)
    x_rows, x_scales = activations_in_int8(x)
    weight = torch.cat([part.dense() for part in parts]).double()
    exact = x_rows.double() @ weight.T * x_scales.double() + bias.double()
    product = make_weights(march, dtype).pack_stored(parts, bias, dtype)
    for rows in NUM_ROWS:
        assert product(x[:rows]).dtype == dtype
        close(product(x[:rows]), exact[:rows])
    whole = product(x)
    assert all(torch.equal(product(x[rows : rows + 1])[0], whole[rows]) for rows in range(20))


def dense(weights: WeightFormat, part, dtype: torch.dtype) -> bool:
    """True if the product equals that of the dense matrix made by `weights`."""
    x = random_rows(5, part.shape[1]).to(dtype)
    expected = weights.pack(part.dense().to(dtype), None)(x)
    return torch.equal(weights.pack_stored([part], None, dtype)(x), expected)


@pytest.mark.parametrize("march", EVERY_MARCH[:1])
def test_activations_stay_as_they_are_where_the_checkpoint_has_not_int8_ones(march):
    weights, part = native(march, torch.bfloat16), w8a8(40, 64)
    assert not dense(weights, part, torch.bfloat16)
    no_activations = ScaledMatrix(part.shape, part.numbers, part.scales, part.block)
    by_group = ScaledMatrix(
        part.shape, part.numbers, random_rows(40, 2).abs(), (1, 32), int8_activations=True
    )
    odd = ScaledMatrix((40, 62), part.numbers[:, :62].contiguous(), part.scales, (1, 62), True)
    for other in (no_activations, by_group, odd):
        assert dense(weights, other, torch.bfloat16)
