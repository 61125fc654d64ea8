"""Weights side by side in huge pages."""

import re
from pathlib import Path

import pytest
import torch

from ingine.engine.kernels.native.memory import CHUNK_BYTES, HUGE_PAGE, Arena

THP, SMAPS = Path("/sys/kernel/mm/transparent_hugepage"), Path("/proc/self/smaps")


def vm_flags(address: int) -> list[str]:
    """Flags of the mapping that contains `address`."""
    is_inside = False
    for line in SMAPS.read_text().splitlines():
        if mapping := re.match("([0-9a-f]+)-([0-9a-f]+) ", line):
            start, end = (int(number, 16) for number in mapping.groups())
            is_inside = start <= address < end
        elif is_inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise LookupError(f"nothing is mapped at {address:#x}")


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
    not THP.exists() or not SMAPS.exists() or "VmFlags" not in SMAPS.read_text(),
    reason="this kernel has no huge pages, or does not tell which were asked for",
)
def test_huge_pages_are_asked_for():
    """The system decides if there are any."""
    for tensor in (Arena().empty((16 << 20,), torch.uint8), Arena().empty((CHUNK_BYTES + 5,), torch.uint8)):
        assert "hg" in vm_flags(tensor.data_ptr()) and "hg" in vm_flags(tensor.data_ptr() + (8 << 20))
