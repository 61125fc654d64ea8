"""The systems that take part, each in a process of its own."""

import os
import subprocess
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.rivals.child import ROOT, Child, SystemFailed, last_line
from benchmarks.rivals.plan import Files, System
from benchmarks.rivals.protocol import Request
from ingine.paths import cache_root

MODELS = ROOT / ".rivals" / "models"
"""Files made from the model for systems that cannot read its folder, by the folder's name."""
MAKE_TIMEOUT_S = 3600
LOAD_TIMEOUT_S = 600
RUN_TIMEOUT_S = 600


class Lineup:
    """The systems that take part. Each is loaded at its first turn, and again after a failure."""

    def __init__(self, model: str, *, log_folder: Path, warm_up: Sequence[Request]):
        self._model, self._log_folder, self._warm_up = model, log_folder, warm_up
        self._children: dict[str, Child] = {}
        self._refused: dict[str, str] = {}
        self.about: dict[str, dict[str, Any]] = {}
        """Versions and settings that each loaded system reported."""

    @property
    def files_of_all(self) -> list[Path]:
        """The files that a start reads, except the system's virtual environment."""
        caches = [cache_root(), Path("~/.cache/vllm").expanduser(), MODELS]
        folders = [Path(self._model), ROOT / "ingine", Path(os.__file__).parent, *caches]
        return [folder for folder in folders if folder.exists()]

    def prepare(self, system: System) -> None:
        """Make the files that a system reads instead of the model's folder, if they are missing.

        Raises SystemFailed.
        """
        files = system.files
        if files is None or (path := self._path(files)).exists():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        command = [ROOT / files.venv / "bin" / "python", "-m", files.module, self._model, path, files.kind]
        log_path = self._log_folder / f"{files.name}.log"
        with log_path.open("ab") as log:
            try:
                made = subprocess.run(
                    command,
                    stdout=log,
                    stderr=log,
                    cwd=ROOT,
                    env=os.environ | {"HF_HUB_OFFLINE": "1"},
                    timeout=MAKE_TIMEOUT_S,
                )
            except (OSError, subprocess.TimeoutExpired) as error:
                raise SystemFailed(f"{files.name} cannot be made: {error}") from error
        if made.returncode or not path.exists():
            raise SystemFailed(f"{files.name} cannot be made: {last_line(log_path)}")

    def _path(self, files: Files) -> Path:
        return MODELS / Path(self._model).name / files.name

    def start(self, system: System) -> Child:
        """Start its process, which loads nothing yet."""
        command = [str(ROOT / system.venv / "bin" / "python"), "-m", system.module]
        try:
            return Child(command, env=dict(system.env), log_path=self._log_folder / f"{system.name}.log")
        except OSError as error:
            raise SystemFailed(f"cannot be started: {error}") from error

    def load(self, system: System, child: Child) -> None:
        files = {"files": str(self._path(system.files))} if system.files else {}
        said = child.load(self._model, dict(system.options) | files, timeout_s=LOAD_TIMEOUT_S)
        self.about[system.name] = {**said, "env": dict(system.env)}

    def run(self, system: System, requests: Sequence[Request]) -> dict[str, Any]:
        """Run requests. Raises SystemFailed. A system that failed to load is not loaded again."""
        if system.name in self._refused:
            raise SystemFailed(self._refused[system.name])
        child = self._children.get(system.name)
        if child is None:
            child = self._ready(system)
        try:
            return child.run(requests, timeout_s=RUN_TIMEOUT_S)
        except SystemFailed:
            self.close(system.name)  # if it lives, it may still compute those requests
            raise

    def _ready(self, system: System) -> Child:
        try:
            self.prepare(system)
            child = self._children[system.name] = self.start(system)
            self.load(system, child)
            child.run(self._warm_up, timeout_s=RUN_TIMEOUT_S)
        except SystemFailed as error:
            self._refused[system.name] = f"load: {error}"
            self.close(system.name)
            raise SystemFailed(self._refused[system.name]) from error
        return child

    def close(self, name: str) -> None:
        if child := self._children.pop(name, None):
            child.close()

    def close_all(self, *, but: Collection[str] = ()) -> None:
        for name in self._children.keys() - set(but):
            self.close(name)


@contextmanager
def lineup(model: str, *, log_folder: Path, warm_up: Sequence[Request]) -> Iterator[Lineup]:
    systems = Lineup(model, log_folder=log_folder, warm_up=warm_up)
    try:
        yield systems
    finally:
        systems.close_all()
