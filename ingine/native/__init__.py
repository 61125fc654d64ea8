"""C++ kernels for the CPU: compiled on this machine when first used, called through ctypes.

They include no header of torch and are given pointers, so they compile in seconds, with any torch. A call
releases the interpreter lock. What they compute has a reference in torch, which serves where they cannot be
built, and which the tests compare them with.
"""

import ctypes
import logging
import os
from functools import cache
from pathlib import Path

import torch

from ingine.native.compiler import BuildError, build

logger = logging.getLogger(__name__)

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
"""What the kernels compute on, and their number for it (`src/vec.h`)."""


@cache
def library() -> ctypes.CDLL | None:
    """The kernels for this machine; None, and one line in the log, where they cannot be had."""
    try:
        return load(build())
    except (BuildError, OSError) as error:
        logger.warning(
            "no native kernels, so attention and sampling run in plain torch, several times slower: %s", error
        )
        return None


def load(path: Path) -> ctypes.CDLL:
    """Raises OSError if the library does not fit into this process."""
    _share_openmp_runtime()
    return ctypes.CDLL(path)


def _share_openmp_runtime() -> None:
    """Let the kernels find torch's OpenMP runtime, with which they are not linked.

    A second runtime would have a second team of threads, and both would spin on the same cores.
    """
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    for path in {line.split()[-1] for line in lines if "libgomp" in line}:
        ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL | os.RTLD_NOLOAD)
