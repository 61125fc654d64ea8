"""examples/step_trace.py prints the lines that docs/learn/step-trace.md explains."""

import re
import subprocess
import sys

from tests.docs.tables import ROOT
from tests.examples.conftest import EXAMPLES
from tests.tiny_models import smollm2_path
from tests.waiting import HANGS_S


def without_times(text: str) -> list[str]:
    return [re.sub(r"[\d.]+ ms", "... ms", line) for line in text.strip().splitlines()]


def test_the_page_has_the_lines_of_a_real_run():
    smollm2_path()
    command = [sys.executable, EXAMPLES / "step_trace.py"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=HANGS_S)
    assert ended.returncode == 0, ended.stderr
    page = (ROOT / "docs" / "learn" / "step-trace.md").read_text()
    shown = re.findall(r"^```text\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert [line for block in shown for line in without_times(block)] == without_times(ended.stdout)
