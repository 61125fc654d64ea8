"""Products with weights in blocks: those of the numbers that are stored, and the same bits in any batch."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from gguf import GGMLQuantizationType

from ingine.engine.kernels.layers.linear import Linear
from ingine.engine.kernels.layers.stored import GGUFMatrix, StoredMatrix
from ingine.engine.kernels.layers.weights import PlainWeights
from ingine.engine.kernels.native.weights import NativeInt8, NativeWeights
from tests.engine.builds import library
from tests.engine.marks import EVERY_MARCH, needs_native
from tests.engine.stored_matrices import BLOCK_SIZES, HALVES, gguf_matrix, int4_matrix, product
from tests.engine.test_native_weights import random_rows

Q = GGMLQuantizationType
NUM_ROWS = (1, 2, 3, 4, 5, 9, 10, 11, 32, 70)
CASES = {kind.name: lambda n, k, kind=kind: gguf_matrix(kind, n, k) for kind in HALVES}
CASES |= {f"int4-g{size}": lambda n, k, size=size: int4_matrix(n, k, size) for size in (32, 128)}

every_march = pytest.mark.parametrize("march", EVERY_MARCH)
every_case = pytest.mark.parametrize("case", CASES)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def native(march: str, dtype: torch.dtype = torch.float32) -> NativeWeights:
    return NativeWeights(library(march), dtype, PlainWeights())


def close(ours: torch.Tensor, exact: torch.Tensor) -> None:
    """Equal but for one rounding to the dtype of `ours`, and what sums in float32 lose."""
    rounding = 2**-8 if ours.dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(ours.double(), exact, rtol=rounding, atol=1e-5 * exact.abs().mean().item())


@every_march
@every_case
@pytest.mark.parametrize(("n", "k"), [(1, 256), (33, 512), (70, 2560)])
def test_products_are_those_of_the_stored_numbers(march, case, n, k):
    matrix = CASES[case](n, k)
    x, bias = random_rows(max(NUM_ROWS), k), random_rows(1, n)[0]
    exact = product(x, [matrix])
    for dtype in (torch.float32, torch.bfloat16):
        weights = native(march, dtype)
        bare = weights.pack_stored([matrix], None, dtype)
        with_bias = weights.pack_stored([matrix], bias.to(dtype), dtype)
        rows = x.to(dtype)
        if dtype == torch.bfloat16:
            exact = product(rows, [matrix])
        for count in NUM_ROWS:
            close(bare(rows[:count]), exact[:count])
            close(with_bias(rows[:count]), exact[:count] + bias.to(dtype).double())


@every_march
@pytest.mark.parametrize("k", [32, 64, 224, 288])
@pytest.mark.parametrize("case", ["Q8_0", "Q4_0", "Q4_1", "int4-g32"])
def test_rows_need_not_be_whole_superblocks(march, case, k):
    matrix, x = CASES[case](40, k), random_rows(11, k)
    close(native(march).pack_stored([matrix], None, torch.float32)(x), product(x, [matrix]))


@every_march
def test_parts_of_different_kinds_are_one_product(march):
    parts: list[StoredMatrix] = [
        make(n, 512) for n, make in zip((7, 64, 33, 1, 32, 100, 5, 40), CASES.values(), strict=True)
    ]
    order = torch.randperm(64, generator=torch.Generator().manual_seed(2))
    parts[1] = replace(parts[1], row_order=order)
    x, bias = random_rows(13, 512), random_rows(1, sum(part.shape[0] for part in parts))[0]
    ours = native(march).pack_stored(parts, bias, torch.float32)(x)
    close(ours, product(x, parts) + bias.double())
    alone = [native(march).pack_stored([part], None, torch.float32)(x) for part in parts]
    assert torch.equal(ours, torch.cat(alone, dim=1) + bias)


@every_march
@every_case
def test_a_row_gives_the_same_bits_in_any_batch_and_with_any_number_of_threads(march, case):
    bits = native(march).pack_stored([CASES[case](200, 768)], None, torch.float32)
    x = random_rows(485, 768)
    whole, num_threads = bits(x), torch.get_num_threads()
    for rows in (1, 2, 3, 7, 10, 12, 70, 481):
        assert torch.equal(bits(x[:rows]), whole[:rows])
        assert torch.equal(bits(x[-rows:].contiguous()), whole[-rows:])
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(bits(x), whole)
    finally:
        torch.set_num_threads(num_threads)


@pytest.mark.parametrize("march", EVERY_MARCH[1:4])
@every_case
def test_builds_with_fused_multiplication_give_each_others_bits(march, case):
    matrix, x = CASES[case](96, 768), random_rows(13, 768)
    ours = native(march).pack_stored([matrix], None, torch.float32)(x)
    assert torch.equal(ours, native("x86-64-v3").pack_stored([matrix], None, torch.float32)(x))


@every_march
@every_case
def test_sums_do_not_overflow_where_all_numbers_are_the_largest(march, case):
    """Signs vary: bytes 0 and 255 are the ends of every kind's codes, 127 and 128 those of Q8_0."""
    x = torch.ones(3, 1024)
    x[1] = -1
    x[2, ::2] = -1
    for byte in (0, 255, 127, 128):
        matrix = CASES[case](40, 1024)
        if isinstance(matrix, GGUFMatrix):
            matrix.data.fill_(byte)
            for at in HALVES[matrix.kind]:
                matrix.data.view(-1, BLOCK_SIZES[matrix.kind][1])[:, at : at + 2] = torch.tensor(
                    [0, 0x3C]
                )  # 1
        else:
            matrix.codes.fill_(byte)
        close(native(march).pack_stored([matrix], None, torch.float32)(x), product(x, [matrix]))


@every_march
@pytest.mark.parametrize("kind", HALVES, ids=str)
def test_scales_that_are_not_finite_stay_in_their_column(march, kind):
    matrix, x = gguf_matrix(kind, 40, 512, scales=(0.01,)), random_rows(6, 512)
    expected = native(march).pack_stored([matrix], None, torch.float32)(x)
    for row, value in ((3, torch.inf), (20, torch.nan), (39, -torch.inf)):
        halves = torch.tensor([value], dtype=torch.float16).view(torch.uint8)
        matrix.data[row, HALVES[kind][0] : HALVES[kind][0] + 2] = halves
    out = native(march).pack_stored([matrix], None, torch.float32)(x)
    assert not out[:, [3, 20, 39]].isfinite().any()
    kept = [column for column in range(40) if column not in (3, 20, 39)]
    assert torch.equal(out[:, kept], expected[:, kept])


@every_march
@every_case
def test_what_is_not_finite_or_is_tiny_stays_in_its_row(march, case):
    bits = native(march).pack_stored([CASES[case](40, 256)], None, torch.float32)
    x = random_rows(6, 256)
    expected = bits(x)
    x[1, 5], x[2, 6], x[3], x[4] = torch.nan, torch.inf, 0, 1e-40
    out = bits(x)
    assert not out[[1, 2]].isfinite().any()
    assert out[3].eq(0).all() and out[4].abs().max() < 1e-30
    assert torch.equal(out[[0, 5]], expected[[0, 5]])


@every_march
@every_dtype
@every_case
def test_rows_can_be_had_out_of_a_vocabulary_matrix(march, dtype, case):
    matrix = CASES[case](101, 512)
    if isinstance(matrix, GGUFMatrix):
        order = torch.randperm(101, generator=torch.Generator().manual_seed(2))
        matrix = replace(matrix, row_order=order)
    expected = matrix.dense().to(dtype)
    multiply, tied = native(march, dtype).pack_tied_stored(matrix, dtype)
    token_ids = torch.tensor([0, 100, 31, 32, 32, *range(60)])
    for embedding in (tied, native(march, dtype).embed_stored(matrix, dtype)):
        assert torch.equal(embedding(token_ids), expected[token_ids])
        assert embedding(token_ids[:0]).shape == (0, 512)
    x = random_rows(2, 512).to(dtype)
    close(multiply(x), product(x, [matrix]))


@needs_native
def test_kinds_without_kernels_become_dense():
    q5_0 = GGUFMatrix((8, 64), Q.Q5_0, torch.full((8, 44), 5, dtype=torch.uint8))
    odd_groups = int4_matrix(8, 64, 16)
    x, q8_0, bias = random_rows(3, 64), gguf_matrix(Q.Q8_0, 8, 64), random_rows(1, 16)[0]
    mixed = native("native").pack_stored([q5_0, q8_0], bias, torch.float32)(x)
    torch.testing.assert_close(mixed[:, :8], x @ q5_0.dense().T + bias[:8], rtol=1e-5, atol=1e-5)
    close(mixed[:, 8:], product(x, [q8_0]) + bias[8:])
    for parts in ([q5_0], [odd_groups], [q5_0, odd_groups]):
        dense = torch.cat([part.dense() for part in parts])
        out = native("native").pack_stored(parts, None, torch.float32)(x)
        torch.testing.assert_close(out, x @ dense.T, rtol=1e-5, atol=1e-5)
    token_ids = torch.tensor([7, 0])
    assert torch.equal(native("native").embed_stored(q5_0, torch.float32)(token_ids), q5_0.dense()[token_ids])
    _, embedding = native("native").pack_tied_stored(odd_groups, torch.float32)
    assert torch.equal(embedding(token_ids), odd_groups.dense()[token_ids])


@needs_native
def test_int8_weights_stand_beside_those_in_blocks():
    matrix, x = gguf_matrix(Q.Q6_K, 40, 512), random_rows(3, 512)
    ours = NativeInt8(library("native"), torch.float32, PlainWeights())
    close(ours.pack_stored([matrix], None, torch.float32)(x), product(x, [matrix]))


AT_THE_END_OF_A_MAPPING = """
import ctypes, mmap, sys, torch
from ingine.engine.kernels.layers.stored import GGUFMatrix
from tests.engine.stored_matrices import BLOCK_SIZES, HALVES, gguf_matrix
from tests.engine.test_block_weights import native

for kind in HALVES:
    made = gguf_matrix(kind, 35, 512)
    pages = -(-made.data.nbytes // mmap.PAGESIZE)
    mapping = mmap.mmap(-1, (pages + 2) * mmap.PAGESIZE)
    memory = torch.frombuffer(mapping, dtype=torch.uint8)
    first, last = memory.data_ptr(), memory.data_ptr() + (pages + 1) * mmap.PAGESIZE
    for closed in (first, last):
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(closed), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    inner = memory[mmap.PAGESIZE : -mmap.PAGESIZE]
    for place in (inner[: made.data.nbytes], inner[-made.data.nbytes :]):
        place.copy_(made.data.view(-1))
        matrix = GGUFMatrix(made.shape, kind, place.view(made.data.shape))
        x = torch.ones(3, 512)
        multiply, rows = native(sys.argv[1]).pack_tied_stored(matrix, torch.float32)
        assert torch.equal(multiply(x), native(sys.argv[1]).pack_stored([made], None, torch.float32)(x))
        assert torch.equal(rows(torch.tensor([0, 34])), made.dense()[[0, 34]])
"""


@every_march
def test_nothing_is_read_outside_a_mapping(march):
    """The check runs in a separate process, which a read outside would kill."""
    done = subprocess.run(
        [sys.executable, "-c", AT_THE_END_OF_A_MAPPING, march], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


@needs_native
def test_a_layer_counts_what_it_multiplies_as_stored():
    """The count is part of the name of a model's numerics, and includes an embedding as output matrix."""
    weights, matrix = native("native"), gguf_matrix(Q.Q8_0, 40, 512)
    q5_0 = GGUFMatrix((8, 64), Q.Q5_0, torch.full((8, 44), 5, dtype=torch.uint8))
    for stored, expected in ((matrix, 1), (q5_0, 0)):
        rows, columns = stored.shape
        tied = Linear(columns, [rows], bias=False, dtype=torch.float32, device=torch.device("cpu"))
        tied.pack_tied_stored(weights, stored)
        assert tied.num_rounding == expected
