"""C++ kernels for the CPU: compiled on this machine when first used, called through ctypes.

They include no header of torch and take pointers, so they compile in seconds and work with any torch. A call
releases the interpreter lock. Each kernel has a reference in torch, which is used where the kernels cannot be
built, and with which the tests compare them.
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
"""The dtypes that the kernels compute on, with their numbers in `src/vec.h`."""


@cache
def library() -> ctypes.CDLL | None:
    """Return the kernels for this machine. If they cannot be built, log one line and return None."""
    try:
        return load(build())
    except (BuildError, OSError) as error:
        logger.warning(
            "no native kernels, so attention and sampling run in plain torch, several times slower: %s", error
        )
        return None


def library_for(device: torch.device, dtype: torch.dtype) -> ctypes.CDLL | None:
    """Return the kernels if they compute `dtype` on `device`, else None."""
    return library() if device.type == "cpu" and dtype in DTYPES else None


def load(path: Path) -> ctypes.CDLL:
    """Load the library. Raises OSError if this process cannot load it."""
    _share_openmp_runtime()
    return ctypes.CDLL(path)


def _share_openmp_runtime() -> None:
    """Make torch's OpenMP runtime visible to the kernels, which are not linked with one.

    A second runtime would have a second team of threads, and both would spin on the same cores.
    """
    maps = Path("/proc/self/maps")
    for path in openmp_runtimes(maps.read_text() if maps.exists() else ""):
        ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL | os.RTLD_NOLOAD)


def openmp_runtimes(maps: str) -> set[str]:
    """Return the paths of libgomp in a text like /proc/self/maps: torch's own if it has one, else all that
    are loaded, one of which torch uses.
    """
    paths = {line.split(maxsplit=5)[-1] for line in maps.splitlines() if "libgomp" in line}
    folder = str(Path(torch.__file__).parent)
    own = {path for path in paths if path.startswith((f"{folder}/", f"{folder}.libs/"))}
    return own or paths
