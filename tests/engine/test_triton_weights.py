"""Products with quantised weights as they are stored, in Triton: those with what the matrix is made dense."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ingine.engine.kernels.layers.stored import Int4Matrix, ReorderedMatrix, ScaledMatrix, StoredMatrix
from ingine.engine.kernels.layers.weights import PlainWeights
from tests.engine.marks import needs_interpreter
from tests.engine.test_layer_ops import round_to_nearest

pytestmark = needs_interpreter


@pytest.fixture(scope="module", autouse=True)
def rounding():
    with pytest.MonkeyPatch.context() as monkeypatch:
        round_to_nearest(monkeypatch)
        yield


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def int4(n: int, k: int, group_size: int, seed: int = 0) -> Int4Matrix:
    dice = generator(seed)
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, generator=dice)
    scales = torch.rand((n, k // group_size), generator=dice).half() + 0.01
    zeros = (torch.rand((n, k // group_size), generator=dice) * 15).half()
    return Int4Matrix((n, k), codes, scales, zeros)


def scaled(n: int, k: int, block: tuple[int, int], dtype: torch.dtype, seed: int = 0) -> ScaledMatrix:
    dice = generator(seed)
    bits = torch.randint(0, 256, (n, k), dtype=torch.uint8, generator=dice)
    if dtype == torch.float8_e4m3fn:
        bits[bits & 0x7F == 0x7F] = 0  # no number
    grid = -(-n // block[0]), -(-k // block[1])
    return ScaledMatrix((n, k), bits.view(dtype), torch.rand(grid, generator=dice) + 0.01, block)


FP8 = torch.float8_e4m3fn
MATRICES: dict[str, StoredMatrix] = {
    "int4, groups of 128": int4(96, 256, 128),
    "int4, groups of 32": int4(70, 128, 32),
    "int4, a group a row, padded": int4(33, 96, 96),
    "int4, groups of 16": int4(40, 144, 48),
    "int4, odd groups": int4(40, 72, 12),
    "int8 by row": scaled(70, 192, (1, 192), torch.int8),
    "int8, groups": scaled(33, 96, (1, 32), torch.int8),
    "fp8, one scale": scaled(64, 100, (64, 100), FP8),
    "fp8 by row": scaled(40, 64, (1, 64), FP8),
    "fp8, blocks": scaled(200, 300, (128, 128), FP8),
    "fp8, small blocks": scaled(50, 90, (24, 48), FP8),
    "fp8, odd blocks": scaled(50, 90, (24, 40), FP8),
}


def random(num_rows: int, k: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn((num_rows, k), generator=generator(1)).to(dtype)


def assert_product(parts: list[StoredMatrix], x: Tensor, bias: Tensor | None = None) -> None:
    from ingine.engine.kernels.layers.triton_weights import TritonWeights

    out = TritonWeights().pack_stored(parts, bias, x.dtype)(x)
    assert out.dtype == x.dtype and out.is_contiguous()
    weight = torch.cat([part.dense().to(x.dtype) for part in parts]).double()
    expected = F.linear(x.double(), weight, None if bias is None else bias.double())
    # float32 sums, rounded once.
    magnitude = x.double().abs() @ weight.abs().T
    tolerance = magnitude * 2**-20 + expected.abs() * torch.finfo(x.dtype).eps
    assert ((out.double() - expected).abs() <= tolerance + 1e-6).all()


@pytest.mark.parametrize("num_rows", [1, 17])
@pytest.mark.parametrize("name", MATRICES)
def test_a_product_is_that_of_the_dense_matrix(name, num_rows):
    matrix = MATRICES[name]
    assert_product([matrix], random(num_rows, matrix.shape[1]))


@pytest.mark.parametrize("name", ["int4, groups of 128", "int8 by row", "fp8, blocks"])
def test_a_product_in_float16(name):
    matrix = MATRICES[name]
    assert_product([matrix], random(3, matrix.shape[1], torch.float16))


@pytest.mark.parametrize("name", MATRICES)
def test_which_matrices_stay_as_they_are_stored(name, monkeypatch):
    from ingine.engine.kernels.layers import triton_weights

    made = []
    monkeypatch.setattr(triton_weights, "_product", lambda packed, bias: made.append(packed))
    triton_weights.TritonWeights().pack_stored([MATRICES[name]], None, torch.float32)
    assert not made
    triton_weights.TritonWeights().pack_stored([MATRICES[name]], None, torch.bfloat16)
    assert len(made) == ("odd" not in name)


@pytest.mark.parametrize("name", ["int4, groups of 32", "fp8, blocks"])
def test_many_rows(name):
    matrix = MATRICES[name]
    assert_product([matrix], random(150, matrix.shape[1], torch.bfloat16))


@pytest.mark.parametrize("make", [int4, lambda n, k, size: scaled(n, k, (1, size), torch.int8)])
@pytest.mark.parametrize("num_rows", [2, 70])
def test_columns_in_pieces(make, num_rows):
    """Few rows sum them in programs side by side, many in one; with a bias that is added once."""
    from ingine.engine.kernels.layers.triton_weights import pieces_of

    n, k = 33, 1100
    assert pieces_of(n, k).number == 2
    matrix = make(n, k, k)
    assert_product([matrix], random(num_rows, k), bias=random(1, n)[0])


def test_how_columns_are_cut_covers_them():
    from ingine.engine.kernels.layers.triton_weights import pieces_of

    for n in (1, 33, 576, 4096, 28672, 128256):
        for k in (7, 64, 576, 1536, 4096, 14336, 53248):
            number, size = pieces_of(n, k)
            assert number == 1 or size % 128 == 0
            assert (number - 1) * size < k <= number * size
            assert number == 1 or size >= 256


def test_parts_that_are_stored_alike_are_one_product(monkeypatch):
    from ingine.engine.kernels.layers import triton_weights

    parts = [scaled(n, 96, (n, 96), FP8, seed=n) for n in (64, 32, 16)]
    made = []
    monkeypatch.setattr(triton_weights, "_product", lambda packed, bias: made.append(packed))
    triton_weights.TritonWeights().pack_stored(parts, None, torch.bfloat16)
    assert [one.shape for one in made] == [(112, 96)]
    monkeypatch.undo()
    assert_product(parts, random(3, 96), bias=random(1, 112)[0])
    assert_product([int4(16, 96, 32, seed) for seed in range(3)], random(3, 96))


class Dense(StoredMatrix):
    """A kind that no kernel knows."""

    shape = (8, 96)
    name = "unheard"

    def dense(self, rows: slice = slice(None)) -> Tensor:
        return torch.randn(self.shape, generator=generator(3))[rows]


def test_parts_that_are_stored_otherwise_lie_side_by_side():
    matrix = int4(24, 96, 32)
    reordered = ReorderedMatrix(matrix, torch.randperm(96, generator=generator(4)))
    parts = [int4(16, 96, 32), int4(16, 96, 48), scaled(33, 96, (1, 96), FP8), reordered, Dense()]
    bias = random(1, 97)[0]
    assert_product(parts, random(5, 96), bias)
    assert_product(parts, random(5, 96))


def test_columns_that_are_not_in_order_stay_as_they_are_stored(monkeypatch):
    from ingine.engine.kernels.layers import triton_weights

    matrix = ReorderedMatrix(int4(24, 96, 32), torch.randperm(96, generator=generator(4)))
    assert triton_weights.TritonWeights().keeps(matrix, torch.bfloat16)
    assert_product([matrix], random(5, 96), random(1, 24)[0])
    made = []
    monkeypatch.setattr(triton_weights, "_product", lambda packed, bias: made.append(packed))
    triton_weights.TritonWeights().pack_stored([matrix], None, torch.bfloat16)
    assert [one.kind for one in made] == ["int4"]


def test_every_fp8_number_is_decoded():
    bits = torch.arange(256, dtype=torch.uint8)
    matrix = ScaledMatrix((256, 1), bits.view(FP8)[:, None], torch.ones(1, 1), (256, 1))
    from ingine.engine.kernels.layers.triton_weights import TritonWeights

    out = TritonWeights().pack_stored([matrix], None, torch.bfloat16)(torch.ones(1, 1).bfloat16())
    expected = matrix.dense()[:, 0]
    assert expected.isnan().sum() == 2
    torch.testing.assert_close(out[0].float(), expected, rtol=0, atol=0, equal_nan=True)


def test_plain_weights_stay_plain():
    from ingine.engine.kernels.layers.triton_weights import TritonWeights

    weight, x = random(8, 16), random(3, 16)
    assert torch.equal(TritonWeights().pack(weight, None)(x), PlainWeights().pack(weight, None)(x))
