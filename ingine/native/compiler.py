"""Compiles the kernels in `src` for one kind of CPU, once: the library lies in the cache ever after."""

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ingine.errors import ConfigError
from ingine.model_store import cache_root

SOURCES = Path(__file__).parent / "src"

FLAGS = (
    "-std=c++17",
    "-O3",
    "-fopenmp",
    "-fPIC",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wextra",
)


class BuildError(Exception):
    """No compiler, sources that it refuses, or nowhere to put the result."""


def build(march: str = "native") -> Path:
    """The library for `march` (a name of g++'s), compiled first unless it is in the cache.

    Raises BuildError. $CXX is another compiler of GCC's than g++, or a command such as "ccache g++". Two
    processes may build at the same time: the library appears whole, whoever is last.
    """
    compiler = _compiler()
    sources = sorted(SOURCES.glob("*.cpp"))
    try:
        cache = cache_root()
    except ConfigError as error:
        raise BuildError(str(error)) from None
    library = cache / "native" / f"{_digest(compiler, march)}.so"
    if library.exists():
        return library
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            _compile(compiler, march, sources, Path(folder))
            os.replace(Path(folder, "kernels.so"), library)
    except OSError as error:
        raise BuildError(f"{library} cannot be written: {error}") from error
    return library


def _compiler() -> list[str]:
    """The command, without the arguments that are ours."""
    named = os.environ.get("CXX", "").strip() or "g++"
    try:
        compiler = shlex.split(named)
    except ValueError as error:
        raise BuildError(f"$CXX is {named!r}, which is no command: {error}") from error
    if shutil.which(compiler[0]) is None:
        raise BuildError(f"there is no C++ compiler {named!r} ($CXX names another)")
    return compiler


def _compile(compiler: list[str], march: str, sources: Iterable[Path], folder: Path) -> None:
    """All sources at once, then linked without OpenMP's runtime, since the process has torch's."""
    objects = {str(source): str(folder / f"{source.stem}.o") for source in sources}
    flags = [*FLAGS, f"-march={march}"]
    with ThreadPoolExecutor() as threads:
        list(
            threads.map(
                _run, ([*compiler, *flags, "-c", source, "-o", made] for source, made in objects.items())
            )
        )
    _run([*compiler, "-shared", *objects.values(), "-o", str(folder / "kernels.so")])


def _run(command: list[str]) -> None:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise BuildError(f"{' '.join(command)}: {done.stderr.strip()[-2000:]}")


def _digest(compiler: list[str], march: str) -> str:
    """Of all that the library depends on: one cache may be shared by machines that differ."""
    parts = [march, *FLAGS, *compiler, _cpu() if march == "native" else ""]
    for program in filter(None, map(shutil.which, compiler)):  # ccache, and what it calls
        stat = os.stat(program)
        parts += [str(stat.st_size), str(stat.st_mtime_ns)]
    for source in sorted(SOURCES.iterdir()):
        parts += [source.name, source.read_text()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    wanted = [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))]
    return platform.machine() + "".join(sorted(set(wanted)))
