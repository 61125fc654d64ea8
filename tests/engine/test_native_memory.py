"""Weights side by side in huge pages."""

from pathlib import Path

import pytest
import torch

from ingine.native.memory import CHUNK_BYTES, HUGE_PAGE, Arena

THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def huge_page_bytes() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("AnonHugePages")) * 1024


def test_tensors_lie_side_by_side_and_apart():
    arena = Arena()
    tensors = [arena.empty((3, 5 + i), torch.bfloat16).fill_(i) for i in range(50)]
    assert all(tensor.eq(i).all() and tensor.shape == (3, 5 + i) for i, tensor in enumerate(tensors))
    assert all(tensor.is_contiguous() and tensor.data_ptr() % 64 == 0 for tensor in tensors)
    addresses = [tensor.data_ptr() for tensor in tensors]
    assert addresses == sorted(addresses) and addresses[-1] - addresses[0] < 50 * 512


def test_one_that_is_larger_than_a_chunk_has_its_own():
    tensor = Arena().empty((CHUNK_BYTES + 5,), torch.uint8).fill_(1)
    assert tensor.numel() == CHUNK_BYTES + 5 and tensor.data_ptr() % HUGE_PAGE == 0


def test_an_empty_one():
    assert Arena().empty((0, 8), torch.float32).shape == (0, 8)


@pytest.mark.skipif(
    not THP.exists() or "[never]" in THP.read_text(), reason="this kernel gives no huge pages"
)
def test_the_memory_is_in_huge_pages():
    before = huge_page_bytes()
    kept = Arena().empty((16 << 20,), torch.uint8).fill_(1)
    assert huge_page_bytes() - before >= 8 << 20 and kept[0] == 1
