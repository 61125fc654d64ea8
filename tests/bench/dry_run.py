"""Runs all parts of `make gpu-check ARGS=--dry-run` in one process, so that torch and transformers load once.

python -m tests.bench.dry_run FILE      writes the report as JSON
"""

import json
import math
import sys
import tempfile
from pathlib import Path

from benchmarks.gpu_check.cells import read_cells
from benchmarks.gpu_check.part import MODULES, run_part
from benchmarks.gpu_check.plan import DRY
from benchmarks.gpu_check.report import as_json
from tests.triton_interpreter import keep_patched

if __name__ == "__main__":
    keep_patched()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "cells.jsonl")
        for part in MODULES:
            run_part(part, DRY, path, until=math.inf)
        report = as_json(read_cells(path), DRY, dry_run=True)
    Path(sys.argv[1]).write_text(json.dumps(report))
