"""Makes an environment like that of `pip install ingine-llm`, in a second: only links to the base
dependencies."""

import sys
import venv
from importlib.metadata import Distribution, distribution
from pathlib import Path

from packaging.requirements import Requirement


def make_base_install(folder: Path) -> Path:
    """Make a virtual environment in `folder`, without pip as uv does, and return its interpreter."""
    venv.create(folder, with_pip=False, symlinks=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = folder / "lib" / version / "site-packages"
    for installed in _with_dependencies("ingine-llm", seen={}).values():
        for top in {file.parts[0] for file in installed.files if file.parts[0] not in ("..", "__pycache__")}:
            (site / top).symlink_to(installed.locate_file(top))
    return folder / "bin" / "python"


def _with_dependencies(name: str, seen: dict[str, Distribution]) -> dict[str, Distribution]:
    if name not in seen:
        seen[name] = distribution(name)
        for line in seen[name].requires or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                _with_dependencies(requirement.name, seen)
    return seen
