"""Runs the parts one after the other, each in a process of its own, within one deadline."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu_check.cells import Cell, describe, read_cells
from benchmarks.gpu_check.plan import Plan

ROOT = Path(__file__).resolve().parents[2]
GRACE_S = 12
"""Time for a part's running cell after the part's time is over."""


def run_parts(parts: Sequence[str], plan: Plan, *, dry_run: bool) -> list[Cell]:
    """Run the parts. Returns all cells, with a failed one for each part that did not end by itself."""
    cells: list[Cell] = []
    deadline = time.time() + plan.total_s
    with tempfile.TemporaryDirectory() as folder:
        for index, part in enumerate(parts):
            kept_for_others = sum(plan.seconds[other] for other in parts[index + 1 :])
            until = deadline - kept_for_others - GRACE_S
            path = Path(folder) / f"{part}.jsonl"
            failure = _run_part(part, path, until, dry_run)
            cells += read_cells(path)
            if failure is not None:
                cells.append(Cell(part, "the whole part", error=failure))
                print(describe(cells[-1]), flush=True)
    return cells


def _run_part(part: str, path: Path, until: float, dry_run: bool) -> str | None:
    """Run one part. Returns why it failed as a whole; None if it ended by itself.

    until: seconds since the epoch, after which it starts no cell.
    """
    command = [sys.executable, "-m", "benchmarks.gpu_check.part", part]
    command += ["--cells", str(path), "--until", str(until)]
    if dry_run:
        command.append("--dry-run")
    timeout = max(0.0, until + GRACE_S - time.time())
    try:
        status = subprocess.run(command, cwd=ROOT, env=environment(dry_run), timeout=timeout).returncode
    except subprocess.TimeoutExpired:
        return f"killed after {timeout:.0f} s"
    return f"ended with status {status}" if status else None


def environment(dry_run: bool) -> dict[str, str]:
    """The environment of a part: no network, and no GPU in a dry run."""
    env = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    return env | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""} if dry_run else env
