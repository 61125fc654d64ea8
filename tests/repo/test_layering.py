"""The rules of docs/design.md on which folder may import what."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BESIDE = ("gateway", "producer", "worker")
"""Packages whose folders lie beside ingine/."""
NOT_IN_BASE = {"torch", "transformers", "tokenizers", "safetensors", "numpy", "gguf", "llguidance"}

SHARED = "shared"
"""The files at the top of ingine/, which every part may use."""
LAYERS = {
    SHARED: set(),
    "contract": {SHARED},
    "connect": {SHARED, "contract"},
    "engine": {SHARED},
    "producer": {SHARED, "contract", "connect"},
    "gateway": {SHARED, "contract", "connect", "producer"},
    "worker": {SHARED, "contract", "connect", "engine"},
    "bench": {SHARED, "contract", "connect", "engine", "producer", "worker"},
    "demo": {SHARED, "contract", "connect", "engine", "producer", "worker", "bench"},
    "top": {SHARED, "contract", "connect", "producer"},
    "cli": {SHARED, "contract", "connect", "engine", "producer", "worker", "gateway", "bench", "demo", "top"},
}
"""Folders that the files of each folder may import beside their own."""
FACES = ("ingine/__init__.py", "ingine/__main__.py")
"""Files that name modules of higher layers, and import them on demand."""
NEVER = {
    SHARED: {"redis", *NOT_IN_BASE},
    "contract": {"redis", *NOT_IN_BASE},
    "connect": NOT_IN_BASE,
    "engine": {"redis"},
    "producer": NOT_IN_BASE,
    "gateway": {"redis", *NOT_IN_BASE},
    "top": NOT_IN_BASE,
}
"""Third-party packages that each folder must not import."""
ENGINE_VALUES = {"config", "outputs", "message_format", "request", "limits"}
"""The files at the top of the engine that every folder of it may import: they import only each
other."""
ENGINE_FOLDERS = {
    "communication": set(),
    "files": set(),
    "parsers": set(),
    "text": {"files", "parsers"},
    "grammar": {"parsers", "text"},
    "kernels": {"communication"},
    "models": {"communication", "files", "text", "kernels"},
    "store": {"files", "models"},
    "schedule": {"grammar", "text"},
    "sample": {"communication", "grammar", "kernels", "schedule"},
    "run": {"communication", "kernels", "models", "grammar", "schedule", "sample"},
}
"""What the files of each folder of the engine may import of it, beside their own folder and the values. The
order is from the bottom up: a folder imports only folders above it in this table."""
INTERNALS_OF_REDIS = ("redis.asyncio.connection", "redis.commands", "redis.crc", "redis.utils")
WITHOUT_TORCH = ("grammar", "schedule", "text", "files", "store", "parsers")
"""Folders of the engine that do only bookkeeping, or read files."""


def imports_of(path: Path, body: list[ast.stmt] | None = None) -> Iterator[str]:
    """Every module that `path` imports, inside functions too; or that the statements of `body` do."""
    nodes = ast.walk(ast.parse(path.read_text())) if body is None else body
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            yield node.module
            if node.module == "ingine":
                yield from (f"ingine.{alias.name}" for alias in node.names)


def imported_at_once(path: Path) -> set[str]:
    """The packages that importing `path` itself imports, without those of its functions."""
    return {name.partition(".")[0] for name in imports_of(path, ast.parse(path.read_text()).body)}


def layer_of(module: str) -> str:
    part = module.split(".")[1] if "." in module else SHARED
    return part if part in LAYERS else SHARED


def sources() -> dict[str, list[Path]]:
    """The files of each layer."""
    found = {layer: [] for layer in LAYERS}
    for top in ("ingine", *BESIDE):
        for path in sorted((ROOT / top).rglob("*.py")):
            inside = path.relative_to(ROOT).parts
            name = inside[1] if top == "ingine" and len(inside) > 2 else top
            found[SHARED if name == "ingine" else name].append(path)
    return found


SOURCES = sources()


def test_every_folder_is_in_a_layer():
    assert all(SOURCES.values())


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_imports_those_below_it(layer):
    for path in SOURCES[layer]:
        if path.relative_to(ROOT).as_posix() in FACES:
            continue
        ours = {name for name in imports_of(path) if name.partition(".")[0] == "ingine"}
        assert {layer_of(name) for name in ours} <= LAYERS[layer] | {layer}, path


def engine_part_of(module: str) -> str:
    """The folder of the engine, or the file at its top, that `module` is of; "" for the package itself."""
    return module.removeprefix("ingine.engine").removeprefix(".").partition(".")[0]


def engine_parts_imported_by(path: Path) -> set[str]:
    return {engine_part_of(name) for name in named_by(path) if name.startswith("ingine.engine")}


def test_every_folder_of_the_engine_has_a_place_in_its_order():
    engine = ROOT / "ingine" / "engine"
    assert {path.parent.name for path in engine.glob("*/*.py")} == ENGINE_FOLDERS.keys()
    below: set[str] = set()
    for folder, allowed in ENGINE_FOLDERS.items():
        assert allowed <= below, f"{folder} may import only what stands before it"
        below.add(folder)


@pytest.mark.parametrize("folder", ENGINE_FOLDERS)
def test_a_folder_of_the_engine_imports_those_below_it(folder):
    for path in sorted((ROOT / "ingine" / "engine" / folder).rglob("*.py")):
        assert engine_parts_imported_by(path) <= ENGINE_FOLDERS[folder] | ENGINE_VALUES | {folder}, path


@pytest.mark.parametrize("name", sorted(ENGINE_VALUES))
def test_the_values_of_the_engine_import_only_each_other(name):
    assert engine_parts_imported_by(ROOT / "ingine" / "engine" / f"{name}.py") <= ENGINE_VALUES


def test_the_contract_takes_little_of_what_all_share():
    for path in SOURCES["contract"]:
        ours = {name for name in imports_of(path) if name.startswith("ingine.")}
        shared = {name for name in ours if layer_of(name) == SHARED}
        assert shared <= {"ingine.errors", "ingine.paths", "ingine.sampling_params"}, path


@pytest.mark.parametrize("layer", NEVER)
def test_a_layer_does_without_these_packages(layer):
    for path in SOURCES[layer]:
        assert not {name.partition(".")[0] for name in imports_of(path)} & NEVER[layer], path


def test_only_connect_knows_the_internals_of_redis_py():
    for layer, paths in SOURCES.items():
        for path in paths if layer != "connect" else ():
            assert not [name for name in imports_of(path) if name.startswith(INTERNALS_OF_REDIS)], path


@pytest.mark.parametrize("folder", WITHOUT_TORCH)
def test_policy_and_files_need_no_torch(folder):
    paths = sorted((ROOT / "ingine" / "engine" / folder).rglob("*.py"))
    assert paths
    for path in paths:
        assert not imported_at_once(path) & {"torch", "transformers"}, path
    loaded = loaded_by(*(f"ingine.engine.{folder}.{path.stem}" for path in paths if path.stem != "__init__"))
    assert not loaded & {"torch", "transformers"}


def test_nothing_imports_in_a_circle():
    graph = {}
    for path in (path for paths in SOURCES.values() for path in paths):
        if path.relative_to(ROOT).as_posix() not in FACES:
            graph[module_of(path)] = set(named_by(path))
    while leaves := {module for module, names in graph.items() if not names & graph.keys()}:
        graph = {module: names for module, names in graph.items() if module not in leaves}
    assert not graph


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "ingine" else ("ingine", *parts)
    return ".".join(parts).removesuffix(".__init__")


def named_by(path: Path) -> Iterator[str]:
    """Every module that `path` may mean: of `from a import b` the module a.b, unless it is a name in a."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                is_module = is_ours(f"{node.module}.{alias.name}")
                yield f"{node.module}.{alias.name}" if is_module else node.module


def is_ours(module: str) -> bool:
    parts = module.split(".")
    path = ROOT.joinpath(*(parts[1:] if parts[1] in BESIDE else parts))
    return path.is_dir() or path.with_suffix(".py").is_file()


def loaded_by(*modules: str) -> set[str]:
    code = f"import sys, {', '.join(modules)}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("layer", ["contract", "connect", "producer"])
def test_the_base_install_is_enough_for(layer):
    assert not loaded_by(*map(module_of, SOURCES[layer])) & NOT_IN_BASE


@pytest.mark.parametrize(
    "module", ["ingine", "ingine.cli.main", "ingine.engine.config", "ingine.worker.settings"]
)
def test_importing_it_loads_no_torch(module):
    assert not loaded_by(module) & {"torch", "transformers", "numpy"}
