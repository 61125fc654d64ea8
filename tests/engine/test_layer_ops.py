"""A decoder's small operations: the native kernels and Triton's against the reference in torch."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from ingine.engine.kernels.layers.ops import LayerOps, TorchOps
from ingine.engine.kernels.native.layer_ops import NativeOps
from tests.engine.builds import library
from tests.engine.marks import EVERY_MARCH, needs_interpreter

DTYPES = [torch.float32, torch.bfloat16]
NUM_ROWS = [1, 3, 64]
"""One, some, and enough for all threads."""
SIZES = [64, 100, 576]
EPS = 1e-5


@pytest.fixture(
    scope="module",
    params=[
        *EVERY_MARCH,
        pytest.param("triton", marks=needs_interpreter),
    ],
)
def ops(request) -> Iterator[LayerOps]:
    """The native kernels by what they are compiled for, and Triton's."""
    if request.param != "triton":
        yield NativeOps(library(request.param))
        return
    from ingine.engine.kernels.layers.triton_ops import TritonOps

    with pytest.MonkeyPatch.context() as monkeypatch:
        round_to_nearest(monkeypatch)
        yield TritonOps()


def round_to_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Round as GPUs do: triton's interpreter (3.6) truncates float32 to bfloat16."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cut_off = InterpreterBuilder.cast_impl

    def cast(self, src, dst_type):
        if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.bfloat16):
            return cut_off(self, src, dst_type)
        rounded = torch.from_numpy(np.ascontiguousarray(src.data)).bfloat16().view(torch.int16)
        return TensorHandle(rounded.numpy().view(np.uint16), tl.bfloat16)

    monkeypatch.setattr(InterpreterBuilder, "cast_impl", cast)


def random(*shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def assert_equal_up_to_rounding(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Assert equality up to the last few bits in float32, and the last one in bfloat16."""
    assert got.dtype == expected.dtype and got.shape == expected.shape
    rtol = 1e-6 if got.dtype == torch.float32 else 2**-7
    torch.testing.assert_close(got, expected, rtol=rtol, atol=1e-7)
    if got.dtype == torch.bfloat16:
        assert (got == expected).float().mean() > 0.99, "rounding differs where a sum is on the edge, no more"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_rows", NUM_ROWS)
@pytest.mark.parametrize("size", SIZES)
def test_rms_norm(ops, dtype, num_rows, size):
    x, weight = random(num_rows, size, dtype=dtype), random(size, dtype=dtype, seed=1)
    assert_equal_up_to_rounding(ops.rms_norm(x, weight, EPS), TorchOps().rms_norm(x, weight, EPS))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_rows", NUM_ROWS)
def test_rms_norm_of_some_heads_of_a_merged_projection(ops, dtype, num_rows):
    heads = random(num_rows, 5, 64, dtype=dtype)
    query, key = heads.split((3, 2), dim=1)
    weight = random(64, dtype=dtype, seed=1)
    for x in (query, key, heads[:, ::2]):
        got = ops.rms_norm(x, weight, EPS)
        assert got.is_contiguous()
        assert_equal_up_to_rounding(got, TorchOps().rms_norm(x, weight, EPS))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_rows", NUM_ROWS)
@pytest.mark.parametrize("size", SIZES)
def test_add_rms_norm_adds_in_place_and_normalises_the_rounded_sum(ops, dtype, num_rows, size):
    residual, x = random(num_rows, size, dtype=dtype), random(num_rows, size, dtype=dtype, seed=1)
    weight = random(size, dtype=dtype, seed=2)
    expected_residual = residual.clone()
    expected = TorchOps().add_rms_norm(expected_residual, x, weight, EPS)
    assert_equal_up_to_rounding(ops.add_rms_norm(residual, x, weight, EPS), expected)
    assert torch.equal(residual, expected_residual)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_rows", NUM_ROWS)
@pytest.mark.parametrize("size", SIZES)
def test_silu_mul(ops, dtype, num_rows, size):
    gate_up = random(num_rows, 2 * size, dtype=dtype)
    assert_equal_up_to_rounding(ops.silu_mul(gate_up), TorchOps().silu_mul(gate_up))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_silu_at_the_ends_of_its_range(ops, dtype):
    gate = torch.tensor([-torch.inf, -1e30, -100, -88, -20, 0, 20, 88, 100, 1e30, torch.inf, torch.nan])
    gate_up = torch.cat((gate, torch.ones(12)))[None].to(dtype)
    got, expected = ops.silu_mul(gate_up), TorchOps().silu_mul(gate_up)
    torch.testing.assert_close(got, expected, rtol=2**-7, atol=1e-30, equal_nan=True)


@needs_interpreter
def test_triton_takes_float16_too():
    from ingine.engine.kernels.layers.triton_ops import TritonOps

    x, gate_up = random(3, 100, dtype=torch.float16), random(3, 200, dtype=torch.float16)
    weight = random(100, dtype=torch.float16, seed=1)
    for got, expected in (
        (TritonOps().rms_norm(x, weight, EPS), TorchOps().rms_norm(x, weight, EPS)),
        (
            TritonOps().add_rms_norm(x.clone(), x, weight, EPS),
            TorchOps().add_rms_norm(x.clone(), x, weight, EPS),
        ),
        (TritonOps().silu_mul(gate_up), TorchOps().silu_mul(gate_up)),
    ):
        torch.testing.assert_close(got, expected, rtol=2**-10, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_that_is_not_finite_spoils_no_other(ops, dtype):
    x, weight = random(3, 64, dtype=dtype), random(64, dtype=dtype, seed=1)
    x[1, 5] = torch.nan
    got = ops.rms_norm(x, weight, EPS)
    assert got[1].isnan().all()
    assert torch.equal(got[::2], ops.rms_norm(x[::2], weight, EPS))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_rows(ops, dtype):
    weight = random(64, dtype=dtype)
    nothing = torch.empty(0, 64, dtype=dtype)
    assert ops.rms_norm(nothing, weight, EPS).shape == (0, 64)
    assert ops.add_rms_norm(nothing, nothing, weight, EPS).shape == (0, 64)
    assert ops.silu_mul(nothing).shape == (0, 32)
