"""Weight formats: the same products as the checkpoint's own layout, and one copy of the weights."""

import ctypes
import os
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from ingine.engine.kernels.layers.int8 import quantize_rows, rotate, row_scales
from ingine.engine.kernels.layers.linear import Linear
from ingine.engine.kernels.layers.onednn import PackedBfloat16, PackedInt8
from ingine.engine.kernels.layers.weights import PlainWeights, WeightFormat
from ingine.engine.kernels.select import REFERENCE
from ingine.engine.models.loader import load_model
from tests.engine.marks import needs_onednn_bfloat16, needs_onednn_int8
from tests.engine.packed import PackedModel, PagedSequence
from tests.paths import needs
from tests.tiny_models import make_tiny_model

SHAPES = [(96, 64), (64, 96), (33, 7), (640, 576), (1, 16)]
"""(out_features, in_features); also such as no vector register divides."""


def make_linear(out_features: int, in_features: int, dtype: torch.dtype, *, bias: bool = False) -> Linear:
    linear = Linear(in_features, [out_features], bias=bias, dtype=dtype, device=torch.device("cpu"))
    linear.allocate()
    generator = torch.Generator().manual_seed(0)
    for parameter in linear.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return linear


def logits(model_path: Path, weights: WeightFormat) -> torch.Tensor:
    model = load_model(
        model_path,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        kernels=replace(REFERENCE, weights=weights),
    )
    sequence = PagedSequence(list(range(40, 77)))
    return torch.cat(PackedModel(model).step((sequence, 37)))


# -------------------------------------------------------------------------------------------- bfloat16


@needs_onednn_bfloat16
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_packed_product_is_that_of_the_plain_weights(shape, bias):
    torch.manual_seed(0)
    linear = make_linear(*shape, torch.bfloat16, bias=bias)
    weight, bias = linear.weight, linear.bias
    linear.pack(PackedBfloat16())
    for num_rows in (1, 2, 33, 200):
        x = torch.randn(num_rows, shape[1], dtype=torch.bfloat16)
        expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
        torch.testing.assert_close(linear(x).double(), expected, rtol=2**-8, atol=1e-2)
        assert linear(x).dtype == torch.bfloat16


ROWS = """
import torch
from ingine.engine.kernels.layers.onednn import PackedBfloat16
generator = torch.Generator().manual_seed(0)
weight, x = (torch.randn(rows, 576, generator=generator).bfloat16() for rows in (960, 130))
linear = PackedBfloat16().pack(weight, None)
whole = linear(x)
assert all(torch.equal(linear(x[:num_rows]), whole[:num_rows]) for num_rows in (1, 2, 31, 64))
"""


@needs("oneDNN in bfloat16, its layout for AVX-512")
def test_what_a_row_gives_does_not_depend_on_the_rows_beside_it():
    """The process disables AMX in oneDNN, with which it would depend on them."""
    env = os.environ | {"DNNL_MAX_CPU_ISA": "AVX512_CORE_BF16"}
    subprocess.run([sys.executable, "-c", ROWS], env=env, check=True)


@needs_onednn_bfloat16
def test_no_step_reorders_the_weights(capfd):
    linear = make_linear(960, 576, torch.bfloat16)
    linear.pack(PackedBfloat16())
    with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
        for num_rows in (1, 32, 500):
            linear(torch.ones(num_rows, 576, dtype=torch.bfloat16))
        ctypes.CDLL(None).fflush(None)  # oneDNN prints through C's own buffer
    steps = [line for line in capfd.readouterr().out.splitlines() if ",exec," in line]
    assert len(steps) == 3
    assert all("inner_product" in step or "matmul" in step for step in steps)


@needs_onednn_bfloat16
def test_packing_keeps_one_copy_of_the_weights():
    linear = make_linear(96, 64, torch.bfloat16)
    plain = weakref.ref(linear.weight)
    linear.pack(PackedBfloat16())
    assert plain() is None


EMBEDDING = """
import weakref, torch
from ingine.engine.kernels.layers.onednn import PackedBfloat16
weight = torch.randn(640, 96).bfloat16()
plain, expected = weakref.ref(weight), weight.clone()
_, embedding = PackedBfloat16().pack_tied(weight)
del weight
assert plain() is None
token_ids = torch.tensor([639, 0, 64, 64, 63, 100])
assert torch.equal(embedding(token_ids), expected[token_ids])
"""


@needs("oneDNN in bfloat16, its layout for AVX-512")
def test_an_embedding_reads_its_rows_out_of_the_packed_output_matrix():
    """The process disables AMX in oneDNN, whose layout is not known."""
    env = os.environ | {"DNNL_MAX_CPU_ISA": "AVX512_CORE_BF16"}
    subprocess.run([sys.executable, "-c", EMBEDDING], env=env, check=True)


@needs_onednn_bfloat16
def test_an_embedding_has_its_rows_in_any_layout():
    torch.manual_seed(0)
    linear = make_linear(640, 96, torch.bfloat16)
    expected = linear.weight.clone()
    embedding = linear.pack_tied(PackedBfloat16())
    token_ids = torch.tensor([639, 0, 64, 64, 63, 100])
    assert torch.equal(embedding(token_ids), expected[token_ids])


@needs_onednn_bfloat16
def test_rows_of_a_layout_that_we_do_not_know_are_kept_as_they_were():
    linear = make_linear(100, 96, torch.bfloat16)  # is padded to whole blocks
    expected = linear.weight.clone()
    embedding = linear.pack_tied(PackedBfloat16())
    assert torch.equal(embedding(torch.tensor([99, 3])), expected[[99, 3]])


@needs_onednn_bfloat16
@pytest.mark.parametrize("tied", [False, True])
def test_a_model_gives_the_same_logits_with_packed_weights(tied, tmp_path):
    path = make_tiny_model(tmp_path, "qwen2", tie_word_embeddings=tied)
    torch.testing.assert_close(
        logits(path, PackedBfloat16()), logits(path, PlainWeights()), rtol=0.02, atol=0.02
    )


# ------------------------------------------------------------------------------------------------ int8


@pytest.mark.parametrize("columns", [64, 576, 36, 7])
def test_a_rotation_of_both_sides_leaves_the_product_as_it_was(columns):
    torch.manual_seed(0)
    x, weight = torch.randn(5, columns), torch.randn(3, columns)
    torch.testing.assert_close(rotate(x) @ rotate(weight).T, x @ weight.T, rtol=1e-5, atol=1e-4)


def test_a_column_that_sticks_out_is_spread_over_the_row():
    torch.manual_seed(0)
    x = torch.randn(50, 576)
    x[:, 123] = 100
    assert (row_scales(rotate(x)) < row_scales(x) / 4).all()


def test_a_quantised_row_is_within_half_a_step_of_what_it_was():
    torch.manual_seed(0)
    weight = torch.randn(5000, 24) * torch.logspace(-3, 3, 5000)[:, None]  # more rows than one part has
    scales, quantized = quantize_rows(weight)
    assert quantized.abs().amax(dim=1).eq(127).all()
    assert ((quantized * scales[:, None] - rotate(weight)).abs() <= scales[:, None] * 0.5001).all()


@needs_onednn_int8
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_an_int8_product_is_exact_in_its_integers(shape, dtype):
    torch.manual_seed(0)
    linear = make_linear(*shape, dtype, bias=True)
    bias, (w_scales, w_quantized) = linear.bias.double(), quantize_rows(linear.weight)
    linear.pack(PackedInt8())
    for num_rows in (1, 2, 33, 200):
        x = torch.randn(num_rows, shape[1]).to(dtype)
        x_scales = row_scales(rotate(x))[:, None]
        x_quantized = rotate(x).div(x_scales).round()
        expected = x_quantized.double() @ w_quantized.double().T * x_scales * w_scales + bias
        rounding = torch.finfo(dtype).eps
        torch.testing.assert_close(linear(x).double(), expected, rtol=rounding, atol=1e-5)


@needs_onednn_int8
def test_an_int8_product_is_near_the_product_whatever_the_rows_magnitudes():
    torch.manual_seed(0)
    weight = torch.randn(640, 576) * torch.logspace(-2, 2, 640)[:, None]
    x = torch.randn(50, 576) * torch.logspace(-2, 2, 50)[:, None]
    magnitudes = x.norm(dim=1)[:, None] * weight.norm(dim=1)
    error = (PackedInt8().pack(weight, None)(x) - F.linear(x, weight)) / magnitudes
    assert error.abs().max() < 0.004


@needs_onednn_int8
def test_rows_of_zeros_and_of_what_is_no_number_stay_that():
    torch.manual_seed(0)
    product = PackedInt8().pack(torch.cat((torch.randn(7, 16), torch.zeros(1, 16))), None)
    x = torch.randn(4, 16)
    x[1], x[2, 3] = 0, torch.nan
    out = product(x)
    assert out[1].eq(0).all()
    assert out[:2, 7].eq(0).all()
    assert out[2].isnan().all()
    assert torch.equal(out[3:], product(x[3:]))


@needs_onednn_int8
@pytest.mark.parametrize("tied", [False, True])
def test_a_model_in_int8_is_near_the_model_in_bfloat16(tied, tmp_path):
    path = make_tiny_model(tmp_path, "qwen2", tie_word_embeddings=tied)
    expected = logits(path, PlainWeights())
    error = logits(path, PackedInt8()) - expected
    assert 0 < error.norm() < 0.05 * expected.norm()


# ----------------------------------------------------------------------------------------------- plain


def test_plain_weights_are_kept_and_shared_with_the_embedding():
    linear = make_linear(96, 64, torch.float32)
    weight = linear.weight
    embedding = linear.pack_tied(PlainWeights())
    assert torch.equal(embedding(torch.tensor([5])), weight[5:6])
    assert torch.equal(linear(weight[:3]), F.linear(weight[:3], weight))
