"""The demo's workers: real `ingine worker` programs, with a thread each and a short lease."""

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Self

from ingine.errors import IngineError
from worker.child import Child

LEASE_S = 3.0
MAX_NUM_SEQS = 16
MAX_MODEL_LEN = 1024


class Workers:
    """Started on entry; on exit told to drain, and waited for. Their logs are files in `folder`."""

    def __init__(self, names: Iterable[str], *, redis_url: str, queue: str, model: str | None, folder: Path):
        self._folder = folder
        self._env = os.environ | {
            "INGINE_REDIS_URL": redis_url,
            "INGINE_QUEUE": queue,
            "INGINE_LEASE_S": str(LEASE_S),
            "INGINE_MAX_NUM_SEQS": str(MAX_NUM_SEQS),
            "INGINE_MAX_MODEL_LEN": str(MAX_MODEL_LEN),
            "INGINE_HTTP_PORT": "-1",
            "OMP_NUM_THREADS": "1",
        }
        if model:
            self._env["INGINE_MODEL"] = model
        self._children: dict[str, Child | None] = dict.fromkeys(names)

    def __enter__(self) -> Self:
        for name in self._children:
            with self._log(name).open("wb") as output:
                self._children[name] = Child(
                    [sys.executable, "-m", "ingine.cli", "worker"],
                    output=output,
                    env=self._env | {"INGINE_WORKER_ID": name},
                )
        return self

    def __exit__(self, *_) -> None:
        for child in self._children.values():
            if child:
                child.stop()

    @property
    def names(self) -> list[str]:
        return list(self._children)

    def kill(self, name: str) -> int:
        """`kill -9`. Returns the pid that was."""
        self._children[name].kill()
        return self._children[name].pid

    def require_running(self, names: Iterable[str]) -> None:
        """Raises IngineError, with the end of its log, if one of `names` has ended by itself."""
        for name in names:
            if not self._children[name].running:
                tail = self._log(name).read_text(errors="replace").splitlines()[-10:]
                raise IngineError("\n  ".join([f"{name} ended by itself. The end of its log:", *tail]))

    def _log(self, name: str) -> Path:
        return self._folder / f"{name}.log"
