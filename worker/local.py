"""Run `ingine worker` programs as child processes, for the demo, benchmarks and crash tests."""

import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Self

from ingine.errors import IngineError
from ingine.worker.child import Child
from ingine.worker.settings import ENV_PREFIX

START_TIMEOUT_S = 300.0
READY = "worker ready"


class LocalWorkers:
    """A context manager that starts workers and waits until they are ready, and on exit lets them drain and
    waits for their ends.

    Their logs are files in `folder`. Raises IngineError, with the end of its log, if a worker does not start.
    """

    def __init__(
        self,
        names: Iterable[str],
        *,
        redis_url: str,
        queue: str = "default",
        folder: Path,
        num_threads: int | None = None,
        **settings: object,
    ):
        """`settings`: fields of WorkerSettings, None for a default. `num_threads`: torch's threads in each
        worker."""
        self._folder = folder
        given = {"http_port": -1, "log_level": "info", **settings, "redis_url": redis_url, "queue": queue}
        self._env = dict(os.environ)
        if num_threads:
            self._env["OMP_NUM_THREADS"] = str(num_threads)
        self._env |= {_variable(name): str(value) for name, value in given.items() if value is not None}
        self._children: dict[str, Child | None] = dict.fromkeys(names)

    def __enter__(self) -> Self:
        for name in self._children:
            with self._log(name).open("wb") as output:
                self._children[name] = Child(
                    # -P: modules in the current folder must not shadow the program's own.
                    [sys.executable, "-P", "-m", "ingine.cli.main", "worker"],
                    output=output,
                    env=self._env | {_variable("worker_id"): name},
                )
        try:
            self._wait_until_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        for child in self._children.values():
            if child:
                child.stop()

    @property
    def names(self) -> list[str]:
        return list(self._children)

    def pid(self, name: str) -> int:
        return self._children[name].pid

    def kill(self, name: str) -> None:
        """Send SIGKILL, and wait for the end."""
        self._children[name].kill()

    def terminate(self, name: str) -> int:
        """Send SIGTERM, as a supervisor does, and wait for the end. Returns the exit status."""
        return self._children[name].terminate()

    def log_text(self, name: str) -> str:
        return self._log(name).read_text(errors="replace")

    def require_running(self, names: Iterable[str]) -> None:
        """Raise IngineError, with the end of its log, if one of `names` has ended by itself."""
        for name in names:
            if not self._children[name].running:
                raise IngineError(f"{name} ended by itself.{self._end_of_log(name)}")

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        # From the logs, since this process need not be able to reach the workers' server.
        while missing := [name for name in self.names if READY not in self.log_text(name)]:
            self.require_running(self.names)
            if time.monotonic() > deadline:
                raise IngineError(f"{missing[0]} is not ready.{self._end_of_log(missing[0])}")
            time.sleep(0.05)

    def _end_of_log(self, name: str) -> str:
        tail = self.log_text(name).splitlines()[-10:]
        return "\n  ".join([" The end of its log:", *tail])

    def _log(self, name: str) -> Path:
        return self._folder / f"{name}.log"


def _variable(setting: str) -> str:
    return f"{ENV_PREFIX}{setting.upper()}"
