"""Which package may import what. The rules are in docs/design.md; here they are proven."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOT_IN_BASE = {"torch", "transformers", "tokenizers", "safetensors", "numpy", "gguf"}

COMPOSITION = ("ingine/cli/main.py", "ingine/cli/")
"""Only the command line knows all three packages."""

KNOWS_REDIS = (
    "ingine/connect/servers.py",
    "ingine/connect/url.py",
    "ingine/connect/pubsub.py",
    "ingine/connect/scripts.py",
)
"""What worker and producer both need to get to a server. The engine has nothing to do with it."""
SERVER = {path.removesuffix(".py").replace("/", ".") for path in KNOWS_REDIS}

TORCH_FREE_FILES = [
    *(
        "keys",
        "jobs",
        "events",
        "record",
        "errors",
        "config",
        "sampling_params",
        "sequence",
        "block_manager",
        "scheduler",
        "outputs",
    ),
    *(
        "detokenizer",
        "stop",
        "model_store",
        "model_files",
        "bounded_files",
        "safetensors_header",
        "fingerprint",
    ),
]


def imports_of(path: Path) -> Iterator[str]:
    """Every module that `path` imports anywhere, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            yield node.module


def packages_imported(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports_of(path)}


def sources(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert found
    return [path for path in found if not path.relative_to(ROOT).as_posix().startswith(COMPOSITION)]


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("ingine", {"redis", "worker", "producer"}),
        ("producer", {"worker", *NOT_IN_BASE}),
    ],
)
def test_packages_do_not_reach_over(package, forbidden):
    for path in sources(package):
        found = packages_imported(path) & forbidden
        if path.relative_to(ROOT).as_posix() in KNOWS_REDIS:
            found -= {"redis"}
        assert not found, path


def test_the_engine_knows_no_server():
    for path in sources("ingine"):
        if path.relative_to(ROOT).as_posix() not in KNOWS_REDIS:
            assert not SERVER & set(imports_of(path)), path


def test_the_producer_takes_nothing_of_ours_but_the_contract():
    contract = {
        "ingine",
        "ingine.contract.keys",
        "ingine.contract.jobs",
        "ingine.contract.events",
        "ingine.contract.record",
        "ingine.contract.control",
        "ingine.errors",
        "ingine.sampling_params",
    }
    settings = {"ingine.connect.secrets", "ingine.connect.environment", "ingine.byte_sizes"}
    allowed = contract | settings | SERVER
    allowed |= {
        "ingine.contract.scripts",
        "ingine.contract.expiry",
        "ingine.contract.faults",
        "ingine.connect.local_server",
    }
    allowed |= {"ingine.terminal"}
    for path in sources("producer"):
        ours = {name for name in imports_of(path) if name.partition(".")[0] == "ingine"}
        assert ours <= allowed, path


def test_the_worker_needs_the_producer_for_demo_and_bench_only():
    for path in sources("worker"):
        if path.relative_to(ROOT).parts[1] not in ("demo", "bench"):
            assert "producer" not in packages_imported(path), path


@pytest.mark.parametrize("name", TORCH_FREE_FILES)
def test_policy_needs_no_torch(name):
    assert "torch" not in packages_imported(ROOT / "ingine" / f"{name}.py")


def loaded_by(module: str) -> set[str]:
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "module",
    [
        "producer",
        "ingine",
        "ingine.contract.keys",
        "ingine.contract.jobs",
        "ingine.contract.events",
        "ingine.errors",
        "ingine.sampling_params",
        "ingine.contract.expiry",
        "ingine.cli.main",
    ],
)
def test_the_base_install_is_enough_for(module):
    assert not loaded_by(module) & NOT_IN_BASE


@pytest.mark.parametrize(
    "module",
    [
        "ingine.engine.schedule.scheduler",
        "ingine.engine.schedule.block_manager",
        "ingine.engine.config",
        "ingine.worker.settings",
    ],
)
def test_importing_it_loads_no_torch(module):
    assert not loaded_by(module) & {"torch", "transformers"}
