"""pyproject.toml lists all packages, and they install beside modules of any name."""

import json
import os
import subprocess
import sys
import tomllib
from email import message_from_bytes
from pathlib import Path
from zipfile import ZipFile

import pytest

import ingine.gateway
import ingine.producer
import ingine.worker
from tests.builds import build_wheel, copy_sources, install, make_environment
from tests.waiting import HANGS_S

ROOT = Path(__file__).resolve().parents[2]
TOPS = ("ingine", "gateway", "producer", "worker")
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def folder_of(package: str) -> Path:
    for prefix, folder in SETTINGS["package-dir"].items():
        if package == prefix or package.startswith(f"{prefix}."):
            return ROOT.joinpath(folder, *package.removeprefix(prefix).split("."))
    return ROOT.joinpath(*package.split("."))


def test_every_package_is_listed():
    folders = {path.parent for top in TOPS for path in (ROOT / top).rglob("*.py")}
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
        for top in TOPS
        for path in (ROOT / top).rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    assert listed == there


def test_this_checkout_is_what_is_tested():
    assert Path(ingine.__file__).parent == ROOT / "ingine"
    assert Path(ingine.worker.__file__).parent == ROOT / "worker"
    assert Path(ingine.producer.__file__).parent == ROOT / "producer"
    assert Path(ingine.gateway.__file__).parent == ROOT / "gateway"


FROM_ELSEWHERE = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "Editable" not in getattr(finder, "__name__", "")]
import ingine.producer, ingine.worker
print(ingine.producer.__file__, ingine.worker.__file__)
"""


def test_a_checkout_on_the_path_needs_no_installation(tmp_path):
    """A benchmark that compares two checkouts needs this, and a machine where nothing can be installed."""
    done = subprocess.run(
        [sys.executable, "-c", FROM_ELSEWHERE],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [str(ROOT / part / "__init__.py") for part in ("producer", "worker")]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


def test_a_wheel_has_the_package_and_nothing_else(wheel):
    metadata = f"{wheel.name.removesuffix('-py3-none-any.whl')}.dist-info"
    there = {
        Path("ingine", path.relative_to(beside))
        for top, beside in (("ingine", ROOT / "ingine"), *((top, ROOT) for top in TOPS[1:]))
        for path in (ROOT / top).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    with ZipFile(wheel) as archive:
        found = {Path(name) for name in archive.namelist() if not name.startswith(f"{metadata}/")}
        described = message_from_bytes(archive.read(f"{metadata}/METADATA"))
    assert found == there
    assert described["Name"] == "ingine-llm"


@pytest.fixture(scope="module", params=["wheel", "editable"])
def installation(request, tmp_path_factory) -> tuple[Path, Path]:
    """An interpreter, and the folder of its ingine."""
    folder = tmp_path_factory.mktemp("installation")
    python = make_environment(folder / "venv")
    if request.param == "wheel":
        install(python, request.getfixturevalue("wheel"))
        return python, folder / "venv"
    sources = copy_sources(folder / "checkout")
    install(python, "--editable", sources)
    return python, sources


MAIN = """
import json, sys
import producer, worker
from ingine import AsyncClient, Client
loaded_by_clients = sorted({"torch", "numpy"} & sys.modules.keys())
from ingine import LLM, SamplingParams
import ingine.producer, ingine.worker

modules = (worker, producer, ingine, ingine.worker, ingine.producer)
print(json.dumps({
    "files": [module.__file__ for module in modules],
    "loaded_by_clients": loaded_by_clients,
    "classes": [kind.__module__ for kind in (Client, AsyncClient, LLM, SamplingParams)],
}))
"""


@pytest.fixture
def project(tmp_path) -> Path:
    """A user's program, two of whose modules have names of our folders."""
    for name in ("worker", "producer"):
        (tmp_path / f"{name}.py").write_text("import ingine\n")
    (tmp_path / "main.py").write_text(MAIN)
    return tmp_path


def run(python: Path, *arguments: str, cwd: Path) -> str:
    """Run the program, and return what it printed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [python, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=HANGS_S
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_project_keeps_its_own_worker_and_producer(installation, project):
    python, home = installation
    told = json.loads(run(python, "main.py", cwd=project))
    theirs, ours = told["files"][:2], told["files"][2:]
    assert theirs == [str(project / "worker.py"), str(project / "producer.py")]
    assert all(Path(file).is_relative_to(home) for file in ours), ours
    assert told["loaded_by_clients"] == []
    assert told["classes"] == [
        "ingine.producer.sync",
        "ingine.producer.client",
        "ingine.engine.llm",
        "ingine.sampling_params",
    ]


def test_commands_work_in_such_a_project(installation, project):
    python, _ = installation
    assert "--redis-url" in run(python, "-m", "ingine", "worker", "--help", cwd=project)
    script = python.with_name("ingine")
    assert "--stream" in run(python, str(script), "submit", "--help", cwd=project)


def test_it_offers_no_top_level_module_but_ingine(installation, tmp_path):
    python, _ = installation
    names = ("ingine", "worker", "producer", "gateway")
    program = f"from importlib.util import find_spec; print([name for name in {names} if find_spec(name)])"
    assert run(python, "-c", program, cwd=tmp_path) == "['ingine']\n"
