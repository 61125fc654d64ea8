"""Describes device and versions, without host name and paths, since the figures are published."""

import subprocess
from importlib.metadata import version

import torch

from benchmarks.gpu_check.cells import Figures
from benchmarks.machine import machine


def describe_machine(device: str) -> Figures:
    """The device and versions. Raises RuntimeError if `device` (torch's name) cannot be used."""
    found = {name: machine()[name] for name in ("platform", "cpu", "cpus", "python")}
    found |= {name: version(name) for name in ("torch", "triton", "transformers")}
    if device == "cpu":
        return {"name": "cpu", **found}
    torch.zeros(1, device=device)
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "driver": _driver_version(),
        "cuda": torch.version.cuda,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        **found,
    }


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _driver_version() -> str | None:
    """The driver's version; None without nvidia-smi."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return said.splitlines()[0].strip()
