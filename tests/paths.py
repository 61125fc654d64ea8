"""The paths through the code that not every machine can run, and whether this one can.

A test that takes one has the mark `needs("its name")`. It is skipped where the machine lacks the path. The
summary of a run counts, for each path, the tests that ran and those that could not (`path_summary.py`).
"""

import os
import platform
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from ingine.engine.kernels import native
from ingine.engine.kernels.layers.onednn import bfloat16_is_packable, int8_is_packable

ARM_COMPILER, ARM_EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
HAS_TRITON = find_spec("triton") is not None

MARCHES = {
    "native": "native kernels, built for this CPU",
    "cooperlake": "native kernels, built for AVX-512 BF16",
    "x86-64-v4": "native kernels, built for AVX-512",
    "alderlake": "native kernels, built for AVX-VNNI",
    "x86-64-v3": "native kernels, built for AVX2",
    "x86-64": "native kernels, built for any x86-64",
}
"""CPUs that the kernels are compiled for, by g++'s name. Instructions are chosen at compile time, so a CPU
can run the build for an older one. The last has vectors of four, as builds for other kinds of CPU have."""


def _runs(*capabilities: str) -> bool:
    """True if there is a compiler, and the CPU has one of torch's capabilities."""
    is_x86 = platform.machine() in ("x86_64", "AMD64")
    return is_x86 and torch.backends.cpu.get_cpu_capability() in capabilities and _has_native()


def _cpu_flags() -> list[str]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split() for line in lines if line.startswith("flags")), [])


def _has_native() -> bool:
    return native.library() is not None


def _has_cuda(least: tuple[int, int] = (0, 0)) -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= least


PATHS: dict[str, Callable[[], bool]] = {
    "plain torch": lambda: True,
    MARCHES["native"]: _has_native,
    MARCHES["cooperlake"]: lambda: _runs("AVX512") and "avx512_bf16" in _cpu_flags(),
    MARCHES["x86-64-v4"]: lambda: _runs("AVX512"),
    MARCHES["alderlake"]: lambda: _runs("AVX512", "AVX2") and "avx_vnni" in _cpu_flags(),
    MARCHES["x86-64-v3"]: lambda: _runs("AVX512", "AVX2"),
    MARCHES["x86-64"]: lambda: _runs("AVX512", "AVX2", "DEFAULT"),
    "native kernels that multiply with AMX": lambda: (
        _has_native() and {"amx_bf16", "amx_int8"} <= set(_cpu_flags())
    ),
    "kernels for ARM (a cross compiler and qemu-user)": lambda: (
        shutil.which(ARM_COMPILER) is not None and shutil.which(ARM_EMULATOR) is not None
    ),
    "oneDNN in bfloat16": bfloat16_is_packable,
    "oneDNN in bfloat16, its layout for AVX-512": lambda: (
        bfloat16_is_packable() and torch.cpu._is_avx512_supported()
    ),
    "oneDNN in int8 (VNNI)": int8_is_packable,
    "Triton's interpreter": lambda: HAS_TRITON and not _has_cuda(),
    "Triton": lambda: HAS_TRITON,
    "CUDA": _has_cuda,
    "another user's files (root)": lambda: os.geteuid() == 0,
    "fp8 on CUDA": lambda: _has_cuda((8, 9)),
}


def needs(path: str) -> pytest.MarkDecorator:
    assert path in PATHS, f"there is no such path: {path}"
    return pytest.mark.path(path)
