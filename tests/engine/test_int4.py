"""Weights in four bits: what quantising them loses, and that every machine quantises them alike."""

import os
import subprocess
import sys
from dataclasses import replace

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from ingine.engine.kernels.layers.int4 import GROUP_SIZE, LARGEST_CODE, quantize_int4
from ingine.engine.kernels.layers.int4_weights import Int4Weights, quantize_q8_0
from ingine.engine.kernels.layers.stored import GGUFMatrix, Int4Matrix
from ingine.engine.kernels.layers.weights import PlainWeights
from ingine.engine.kernels.native.weights import NativeInt8
from ingine.engine.kernels.select import REFERENCE
from ingine.engine.models.loader import load_model
from tests.engine.builds import library
from tests.engine.marks import needs_native
from tests.engine.stored_matrices import gguf_matrix, int4_matrix, product
from tests.tiny_models import VOCAB_SIZE, make_tiny_model


def normal(rows: int, columns: int, *, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def heavy_tailed(rows: int, columns: int) -> Tensor:
    """Student's t with 3 degrees of freedom."""
    squares = sum(normal(rows, columns, seed=seed).square() for seed in (1, 2, 3))
    return normal(rows, columns) / (squares / 3).sqrt()


def with_outliers(rows: int, columns: int) -> Tensor:
    weight = normal(rows, columns)
    weight[:, ::GROUP_SIZE] *= 20
    return weight


def one_sided(rows: int, columns: int) -> Tensor:
    return normal(rows, columns).abs() + 0.5


KINDS = {kind.__name__: kind for kind in (normal, heavy_tailed, with_outliers, one_sided)}
every_kind = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)


def least_to_largest(weight: Tensor, group_size: int) -> Tensor:
    """Round in the simplest way: 15 equal steps of each group's range, with exact scales."""
    groups = weight.view(-1, group_size)
    least, largest = (end(dim=1, keepdim=True) for end in (groups.amin, groups.amax))
    least, largest = least.clamp(max=0), largest.clamp(min=0)
    step = (largest - least) / LARGEST_CODE
    return (((groups - least) / step).round() * step + least).view(weight.shape)


def squared_error(weight: Tensor, approximation: Tensor, group_size: int) -> Tensor:
    """The squared error of each group."""
    return (approximation - weight).double().square().view(-1, group_size).sum(dim=1)


def equal(one: Int4Matrix, other: Int4Matrix) -> bool:
    pairs = [(one.codes, other.codes), (one.scales, other.scales), (one.zeros, other.zeros)]
    return one.shape == other.shape and all(torch.equal(a, b) for a, b in pairs)


@every_kind
@pytest.mark.parametrize("group_size", [32, 64])
def test_no_group_loses_more_than_by_rounding_between_its_least_and_largest(make, group_size):
    weight = make(48, 192)
    ours = squared_error(weight, quantize_int4(weight, group_size).dense(), group_size)
    plain = squared_error(weight, least_to_largest(weight, group_size), group_size)
    assert torch.all(ours <= plain * 1.02)  # scales are in float16 here
    if make in (normal, heavy_tailed):
        assert ours.sum() < plain.sum() * 0.85


def test_every_code_is_the_nearest():
    weight = heavy_tailed(64, 128)
    matrix = quantize_int4(weight)
    of_groups = (matrix.scales, matrix.zeros)
    scales, zeros = (one.float().repeat_interleave(GROUP_SIZE, dim=1) for one in of_groups)
    values = (torch.arange(16)[:, None, None] - zeros) * scales
    nearest = (values - weight).abs().amin(dim=0)
    torch.testing.assert_close((matrix.dense() - weight).abs(), nearest, rtol=1e-4, atol=1e-6)


def test_numbers_that_are_on_a_grid_stay_what_they_are():
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (40, 64), dtype=torch.uint8, generator=generator)
    codes[:, ::16] = 0xF0  # each group has both ends
    scales = torch.rand(40, 4, generator=generator).half()
    zeros = torch.randint(0, 16, (40, 4), generator=generator).half()
    weight = Int4Matrix((40, 128), codes, scales, zeros).dense()
    torch.testing.assert_close(quantize_int4(weight).dense(), weight, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("number", [0.0, 1.0, -3.0, 6e4, 1e-5])
def test_a_group_of_one_number_is_that_number(number):
    dense = quantize_int4(torch.full((3, 64), number)).dense()
    torch.testing.assert_close(dense, torch.full((3, 64), number), rtol=0.05, atol=0)


def test_a_group_with_a_number_that_is_not_finite_is_not_a_number_and_no_other_is_touched():
    weight = normal(4, 96)
    expected = quantize_int4(weight).dense()
    for row, number in enumerate((float("nan"), float("inf"), -float("inf"))):
        weight[row, 40] = number
    dense = quantize_int4(weight).dense()
    assert dense[:3, 32:64].isnan().all()
    dense[:3, 32:64] = expected[:3, 32:64]
    assert torch.equal(dense, expected)


def test_large_matrices_are_quantised_row_by_row_as_small_ones_are(monkeypatch):
    weight = normal(70, 96)
    whole = quantize_int4(weight)
    monkeypatch.setattr("ingine.engine.kernels.layers.int4.PART", 96 * 16)
    assert equal(quantize_int4(weight), whole)
    row = quantize_int4(weight[3:4])
    assert torch.equal(row.codes, whole.codes[3:4]) and torch.equal(row.zeros, whole.zeros[3:4])
    assert equal(quantize_int4(weight.t().contiguous().t()), whole)


SAME_BITS = "2c88d1a470b27604f210611298f28c8301a9f8d5eb13dff8a3e6d5804e42f303"
DIGEST = """
import hashlib, torch
from ingine.engine.kernels.layers.int4 import quantize_int4
# Whole numbers, sums of twelve, are near to normal and the same on every machine.
numbers = torch.arange(64 * 192 * 12, dtype=torch.int64).mul_(2654435761).remainder_(2**32) >> 16
matrix = quantize_int4(numbers.view(64, 192, 12).sum(dim=2).sub(6 * 65535).float() / 2**20)
parts = (matrix.codes, matrix.scales.view(torch.int16), matrix.zeros.view(torch.int16))
print(hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest())
"""


@pytest.mark.parametrize(("instructions", "num_threads"), [("default", "1"), ("avx2", "2"), ("avx512", "3")])
def test_every_machine_quantises_to_the_same_bits(instructions, num_threads):
    """The test covers torch's builds that this machine can run.

    A worker that resumes a job has quantised on its own.
    """
    env = os.environ | {"ATEN_CPU_CAPABILITY": instructions, "OMP_NUM_THREADS": num_threads}
    done = subprocess.run([sys.executable, "-c", DIGEST], env=env, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == SAME_BITS


# ------------------------------------------------------------------------------------------- products


def int4(dtype: torch.dtype = torch.float32) -> Int4Weights:
    return Int4Weights(NativeInt8(library("native"), dtype, PlainWeights()))


def close(ours: Tensor, exact: Tensor) -> None:
    """Equal but for one rounding to the dtype of `ours`, and what sums in float32 lose."""
    rounding = 2**-8 if ours.dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(ours.double(), exact, rtol=rounding, atol=1e-5 * exact.abs().mean().item())


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n", "k"), [(1, 32), (40, 96), (70, 576)])
def test_a_packed_product_is_that_of_the_codes_with_rows_in_int8(dtype, n, k):
    weight, bias, x = (
        normal(n, k).to(dtype),
        normal(1, n, seed=1)[0].to(dtype),
        normal(9, k, seed=2).to(dtype),
    )
    exact = product(x, [quantize_int4(weight)])
    weights = int4(dtype)
    close(weights.pack(weight, None)(x), exact)
    close(weights.pack(weight, bias)(x), exact + bias.double())


@needs_native
def test_a_product_is_near_to_that_of_the_weights():
    """Nearer than rounding between the ends of groups comes, whose error is a tenth more."""
    weight, x = normal(512, 768), normal(64, 768, seed=1)
    error = (int4().pack(weight, None)(x) - x @ weight.T).norm() / (x @ weight.T).norm()
    assert 0.06 < error < 0.075


@needs_native
def test_a_tied_matrix_is_held_once_in_eight_bits_for_logits_and_rows():
    weight, x, token_ids = normal(300, 96), normal(5, 96, seed=1), torch.tensor([299, 0, 3, 3])
    logits, rows = int4().pack_tied(weight)
    stored = quantize_q8_0(weight)
    close(logits(x), product(x, [stored]))
    assert torch.equal(rows(token_ids), stored.dense()[token_ids])
    assert stored.data.nbytes == weight.numel() * 34 // 32
    torch.testing.assert_close(rows(token_ids), weight[token_ids], rtol=0, atol=0.02)
    in_parts = [quantize_q8_0(part).data for part in weight.split(7)]
    assert torch.equal(torch.cat(in_parts), stored.data)


@needs_native
def test_rows_that_are_not_whole_groups_are_left_to_the_format_within():
    within, weight, x = (
        NativeInt8(library("native"), torch.float32, PlainWeights()),
        normal(5, 72),
        normal(3, 72),
    )
    assert torch.equal(int4().pack(weight, None)(x), within.pack(weight, None)(x))
    (logits, rows), (expected, _) = int4().pack_tied(weight), within.pack_tied(weight)
    assert torch.equal(logits(x), expected(x)) and torch.equal(rows(torch.tensor([4])), weight[4:])


@needs_native
def test_delicate_rows_are_rounded_to_eight_bits():
    weight, bias, x = normal(70, 96), normal(1, 70, seed=1)[0], normal(5, 96, seed=2)
    parts = [quantize_int4(weight[:47]), quantize_q8_0(weight[47:])]
    close(int4().pack_delicate(weight, bias, 23)(x), product(x, parts) + bias.double())
    close(int4().pack_delicate(weight, None, 70)(x), product(x, [quantize_q8_0(weight)]))


@needs_native
def test_the_values_of_attention_and_an_output_matrix_are_delicate(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        Int4Weights,
        "pack_delicate",
        lambda _, weight, bias, rows, importance=None: asked.append((*weight.shape, rows)),
    )
    path = make_tiny_model(tmp_path)  # 4 heads, 2 of keys and values, of 16 numbers
    kernels = replace(REFERENCE, weights=int4())
    load_model(path, dtype=torch.float32, device=torch.device("cpu"), kernels=kernels)
    layer = [(64 + 32 + 32, 64, 32), (64, 64, 0), (96 + 96, 64, 0), (64, 96, 0)]
    assert asked == [*layer, *layer, (VOCAB_SIZE, 64, VOCAB_SIZE)]


@needs_native
def test_what_a_checkpoint_holds_quantised_stays_where_it_can_be_multiplied():
    q4_k, q6_k, q8_0 = (gguf_matrix(GGMLQuantizationType[kind], 32, 256) for kind in ("Q4_K", "Q6_K", "Q8_0"))
    parts, x = [q4_k, q8_0, int4_matrix(8, 256, 64), q6_k], normal(4, 256)
    assert all(int4().keeps(part, torch.float32) for part in parts)
    close(int4().pack_stored(parts, None, torch.float32)(x), product(x, parts))
    q5_1 = GGUFMatrix(
        (32, 256),
        GGMLQuantizationType.Q5_1,
        torch.from_numpy(gguf.quantize(normal(32, 256, seed=1).numpy(), GGMLQuantizationType.Q5_1)),
    )
    assert not int4().keeps(q5_1, torch.float32)
    expected = product(x, [q4_k, quantize_int4(q5_1.dense())])
    close(int4().pack_stored([q4_k, q5_1], None, torch.float32)(x), expected)
    token_ids = torch.tensor([31, 2])
    rows = int4().pack_tied_stored(q6_k, torch.float32)[1], int4().embed_stored(q6_k, torch.float32)
    assert all(torch.equal(one(token_ids), q6_k.dense()[token_ids]) for one in rows)
