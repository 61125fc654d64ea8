"""What pyproject.toml lists is all that there is: a folder or a file that it leaves out is in no wheel."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import ingine.producer
import ingine.worker

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def folder_of(package: str) -> Path:
    for prefix, folder in SETTINGS["package-dir"].items():
        if package == prefix or package.startswith(f"{prefix}."):
            return ROOT.joinpath(folder, *package.removeprefix(prefix).split("."))
    return ROOT.joinpath(*package.split("."))


def test_every_package_is_listed():
    folders = {path.parent for top in ("ingine", "producer", "worker") for path in (ROOT / top).rglob("*.py")}
    assert {folder_of(package) for package in SETTINGS["packages"]} == folders


def test_every_other_file_is_listed():
    listed = {
        path
        for package, globs in SETTINGS["package-data"].items()
        for pattern in globs
        for path in folder_of(package).glob(pattern)
    }
    there = {
        path
        for top in ("ingine", "producer", "worker")
        for path in (ROOT / top).rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    assert listed == there


def test_this_checkout_is_what_is_tested():
    assert Path(ingine.__file__).parent == ROOT / "ingine"
    assert Path(ingine.worker.__file__).parent == ROOT / "worker"
    assert Path(ingine.producer.__file__).parent == ROOT / "producer"


FROM_ELSEWHERE = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "Editable" not in getattr(finder, "__name__", "")]
import ingine.producer, ingine.worker
print(ingine.producer.__file__, ingine.worker.__file__)
"""


def test_a_checkout_on_the_path_needs_no_installation(tmp_path):
    """As in a benchmark that compares two checkouts, and on a machine where nothing can be installed."""
    done = subprocess.run(
        [sys.executable, "-c", FROM_ELSEWHERE],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [str(ROOT / part / "__init__.py") for part in ("producer", "worker")]
