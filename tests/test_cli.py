"""The `ingine` command as a shell sees it: exit status, one clear line, no traceback."""

import subprocess
import sys

import pytest

from ingine import __version__
from tests.waiting import HANGS_S

WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None  # importing it fails as if it were not installed
from ingine.cli.main import main
sys.argv = ["ingine", *sys.argv[1:]]
main()
"""


def run(*arguments: str, program: tuple[str, ...] = ("-m", "ingine.cli.main")) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *program, *arguments],
        capture_output=True,
        text=True,
        timeout=HANGS_S,
        stdin=subprocess.DEVNULL,
    )


def test_version():
    assert run("--version").stdout.strip() == f"ingine {__version__}"


def test_help_without_a_command():
    shown = run()
    assert "demo" in shown.stdout + shown.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "line"),
    [
        (("pull", "no-such-model"), 2, "no-such-model"),
        (("worker", "--lease-s", "soon"), 2, "lease"),
        (("bench", "--rounds", "0"), 2, "rounds"),
        (("no-such-command",), 2, "no-such-command"),
        (("status", "x", "--redis-url", "redis://127.0.0.1:1/0"), 3, "127.0.0.1:1"),
    ],
)
def test_errors_are_one_clear_line(arguments, status, line):
    shown = run(*arguments)
    assert shown.returncode == status, shown.stderr
    assert line in shown.stderr and "Traceback" not in shown.stderr


@pytest.mark.parametrize("arguments", [("generate", "hi"), ("worker",), ("bench",)])
def test_the_missing_extra_is_named(arguments):
    shown = run(*arguments, program=("-c", WITHOUT_TORCH))
    assert shown.returncode == 2
    assert "ingine-llm[worker]" in shown.stderr and "Traceback" not in shown.stderr
