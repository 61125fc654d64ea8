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

from ingine.engine.kernels.native.compiler import BuildError, build

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


def library_for(device: torch.device, dtype: torch.dtype) -> ctypes.CDLL | None:
    """The kernels, if they compute `dtype` on `device`."""
    return library() if device.type == "cpu" and dtype in DTYPES else None


def load(path: Path) -> ctypes.CDLL:
    """Raises OSError if the library does not fit into this process."""
    _share_openmp_runtime()
    return ctypes.CDLL(path)


def _share_openmp_runtime() -> None:
    """Let the kernels find torch's OpenMP runtime, with which they are not linked.

    A second runtime would have a second team of threads, and both would spin on the same cores.
    """
    maps = Path("/proc/self/maps")
    for path in openmp_runtimes(maps.read_text() if maps.exists() else ""):
        ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL | os.RTLD_NOLOAD)


def openmp_runtimes(maps: str) -> set[str]:
    """The paths of libgomp in a text like /proc/self/maps: torch's own if it has one, else all that are
    loaded, of which torch uses one.
    """
    paths = {line.split(maxsplit=5)[-1] for line in maps.splitlines() if "libgomp" in line}
    folder = str(Path(torch.__file__).parent)
    own = {path for path in paths if path.startswith((f"{folder}/", f"{folder}.libs/"))}
    return own or paths
