"""The parts of the time of a start."""

import json
import subprocess
import sys
import time

from benchmarks.machine import ROOT
from tests.tiny_models import make_tiny_model
from tests.waiting import HANGS_S


def test_a_start_is_told_by_its_parts(tmp_path):
    model = make_tiny_model(tmp_path)
    command = [sys.executable, ROOT / "benchmarks/first_token.py", model, "hi", str(time.time())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANGS_S)
    assert done.returncode == 0, done.stderr
    parts = json.loads(done.stdout)["parts"]
    assert {"import torch", "import ingine", "weights", "tokenizer", "first step"} <= parts.keys()
    assert all(seconds >= 0 for seconds in parts.values())
