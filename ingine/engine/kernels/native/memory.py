"""Memory in huge pages, for what a step reads from end to end."""

import ctypes
import mmap

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20
CHUNK_BYTES = 32 << 20
"""What is asked of the system at a time. Memory that is never written is never taken."""


def advise_huge_pages(memory: Tensor) -> None:
    """Ask for huge pages behind `memory`, before it is first written.

    A core reads weights half as fast again from them: the processor fetches ahead within a page only, and a
    matrix of 4 KiB pages is many. A wish: a system that has none goes on without.
    """
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    start = -(-memory.data_ptr() // HUGE_PAGE) * HUGE_PAGE
    num_bytes = memory.data_ptr() + memory.nbytes - start
    if advice is not None and num_bytes > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(num_bytes), advice)


def release_freed_memory() -> None:
    """Give back what has been freed to the system.

    glibc keeps freed blocks of up to 32 MiB for itself, between others that are in use: while a model is
    loaded, which allocates a matrix and frees it again and again, up to half as much as its weights take.
    Other C libraries have no such call, and nothing happens.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))


class Arena:
    """Many tensors side by side: most matrices are smaller than a huge page. All live until the last dies."""

    def __init__(self):
        self._chunk = torch.empty(0, dtype=torch.uint8)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Uninitialised, contiguous, on a boundary of 64 bytes."""
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        if num_bytes > len(self._chunk):
            self._chunk = torch.empty(max(num_bytes, CHUNK_BYTES) + HUGE_PAGE, dtype=torch.uint8)
            advise_huge_pages(self._chunk)
            self._chunk = self._chunk[-self._chunk.data_ptr() % HUGE_PAGE :]
        memory, self._chunk = self._chunk[:num_bytes], self._chunk[-(-num_bytes // 64) * 64 :]
        return memory.view(dtype).view(shape)
