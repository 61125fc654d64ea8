"""Runs the parts one after the other, each in a process of its own and for as long as the plan says."""

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
"""What a part may take for the cell under way once its time is over."""


def run_parts(parts: Sequence[str], plan: Plan, *, dry_run: bool) -> list[Cell]:
    """All cells, and one that failed for each part that did not end by itself."""
    cells: list[Cell] = []
    with tempfile.TemporaryDirectory() as folder:
        for part in parts:
            path = Path(folder) / f"{part}.jsonl"
            failure = _run_part(part, path, plan.seconds[part], dry_run)
            cells += read_cells(path)
            if failure is not None:
                cells.append(Cell(part, "the whole part", error=failure))
                print(describe(cells[-1]), flush=True)
    return cells


def _run_part(part: str, path: Path, seconds: float, dry_run: bool) -> str | None:
    """Why it failed as a whole; None if it ended by itself."""
    command = [sys.executable, "-m", "benchmarks.gpu_check.part", part]
    command += ["--cells", str(path), "--until", str(time.time() + seconds)]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    if dry_run:
        command.append("--dry-run")
        env |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    try:
        status = subprocess.run(command, cwd=ROOT, env=env, timeout=seconds + GRACE_S).returncode
    except subprocess.TimeoutExpired:
        return f"killed after {seconds + GRACE_S:.0f} s"
    return f"ended with status {status}" if status else None
