"""A system under test as a long-lived child process, which runs only during calls."""

import json
import os
import signal
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.rivals.protocol import Request

ROOT = Path(__file__).resolve().parents[2]


class SystemFailed(Exception):
    """The child answered with an error, died, or took too long."""


class Child:
    """A child process.

    `command` answers as `protocol.serve` does. Its processes are stopped between calls.
    """

    def __init__(self, command: Sequence[str], *, env: dict[str, str], log_path: Path):
        self._log_path = log_path
        log_path.parent.mkdir(parents=True, exist_ok=True)
        with log_path.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=ROOT,
                env=os.environ | env,
                start_new_session=True,  # a process group, with its own children
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def load(self, model: str, options: dict[str, Any], *, timeout_s: float) -> dict[str, Any]:
        return self._call({"call": "load", "model": model, "options": options}, timeout_s)

    def run(self, requests: Sequence[Request], *, timeout_s: float) -> dict[str, Any]:
        return self._call({"call": "run", "requests": requests}, timeout_s)

    def _call(self, call: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """Send a call, and return the answer. Raises SystemFailed."""
        self._signal(signal.SIGCONT)
        too_long = threading.Timer(timeout_s, self._signal, [signal.SIGKILL])
        too_long.start()
        try:
            self._process.stdin.write(json.dumps(call) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            too_long.cancel()
        if not line:
            status = self._process.wait()
            raise SystemFailed(
                f"ended with {status} (after {timeout_s:g} s it is killed): {last_line(self._log_path)}"
            )
        # An engine's idle threads may poll, and would take time from the system whose turn it is.
        self._signal(signal.SIGSTOP)
        answer = json.loads(line)
        if "error" in answer:
            raise SystemFailed(answer["error"])
        return answer

    def close(self) -> None:
        self._signal(signal.SIGKILL)  # it holds nothing that needs an orderly end
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()

    def _signal(self, number: signal.Signals) -> None:
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return  # it has exited; the next read reports that


def last_line(log_path: Path) -> str:
    lines = log_path.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"
