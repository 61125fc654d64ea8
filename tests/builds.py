"""Builds the package from this tree and installs it as users do, in an environment without a network."""

import shutil
import subprocess
import sys
import venv
from importlib.metadata import distribution
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("ingine", "gateway", "producer", "worker")
BESIDE_THEM = ("pyproject.toml", "README.md", "LICENSE")
ALONE = ("--no-index", "--no-deps", "--no-build-isolation")
"""Options of pip: no other package, and a build with the installed tools."""


def copy_sources(folder: Path) -> Path:
    """Copy the files that a build reads into `folder`, since a build leaves files among its sources."""
    for name in SOURCES:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in BESIDE_THEM:
        shutil.copy(ROOT / name, folder)
    return folder


def build_wheel(folder: Path) -> Path:
    """Build a wheel in `folder`, which is empty."""
    _pip("wheel", *ALONE, "--wheel-dir", folder, copy_sources(folder / "sources"))
    (wheel,) = folder.glob("*.whl")
    return wheel


def make_environment(folder: Path) -> Path:
    """Make an environment in `folder` with this one's packages but without ingine.

    Returns its interpreter.
    """
    venv.create(folder, with_pip=False, symlinks=True)
    # A folder listed in a .pth file is searched last, and its own .pth files are not read. So this checkout
    # is not on the path, however it is installed here.
    seen = {str(distribution(name).locate_file("")) for name in ("redis", "torch", "setuptools")}
    (_site_packages(folder) / "seen.pth").write_text("\n".join(sorted(seen)))
    return folder / "bin" / "python"


def _site_packages(environment: Path) -> Path:
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return environment / "lib" / version / "site-packages"


def install(python: Path, *what: str | Path) -> None:
    """Run `pip install` for that interpreter."""
    _pip("--python", python, "install", *ALONE, "--ignore-installed", *what)


def _pip(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
