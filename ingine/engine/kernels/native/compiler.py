"""Compiles the kernels in `src` for one kind of CPU, and caches the library."""

import atexit
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from ingine.errors import ConfigError
from ingine.paths import cache_root
from ingine.private_files import Untrusted, make_private, trusted

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "src"

FLAGS = (
    "-std=c++17",
    "-O3",
    "-fopenmp",
    "-fPIC",
    "-fno-gnu-unique",  # otherwise two builds in one process share the static variables of their templates
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wextra",
)


class BuildError(Exception):
    """Raised if there is no compiler, if it fails, or if there is no safe place for the result."""


def build(march: str = "native") -> Path:
    """Return the library for `march` (a name of g++), and compile it first if it is not in the cache.

    Raises BuildError. $CXX names another compiler of GCC, or a command such as "ccache g++". Two processes
    may build at the same time: each replaces the library atomically.
    """
    compiler = _compiler()
    sources = sorted(SOURCES.glob("*.cpp"))
    try:
        folder = code_folder(cache_root() / "native", "INGINE_CACHE_DIR")
    except ConfigError as error:
        raise BuildError(str(error)) from None
    library = folder / f"{_digest(compiler, march)}.so"
    if _is_ours(library):
        return library
    try:
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            _compile(compiler, march, sources, Path(folder))
            made = Path(folder, "kernels.so")
            made.chmod(0o700)  # whatever the umask is: a library that others can write is not loaded again
            os.replace(made, library)
    except OSError as error:
        raise BuildError(f"{library} cannot be written: {error}") from error
    return library


def code_folder(folder: Path, setting: str) -> Path:
    """Return `folder`, created if missing and without symbolic links. If another user could write to it,
    return a temporary folder that is deleted when this process ends. Raises BuildError if neither is safe.

    setting: the setting that names `folder`, for the log.
    """
    try:
        make_private(folder)
        return trusted(folder)
    except (OSError, Untrusted) as reason:
        logger.warning(
            "%s is not used for compiled code, which is made anew at each start: %s. %s names another folder",
            folder,
            reason,
            setting,
        )
    return _temporary_folder()


@cache
def _temporary_folder() -> Path:
    try:
        folder = Path(tempfile.mkdtemp(prefix="ingine-code-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        return trusted(folder)
    except (OSError, Untrusted) as reason:
        raise BuildError(f"no place is safe for compiled code: {reason}. TMPDIR names another") from None


def _is_ours(library: Path) -> bool:
    """Return whether the library exists and no other user can have written it."""
    try:
        return trusted(library) == library
    except (OSError, Untrusted):
        return False


def _compiler() -> list[str]:
    """Return the compiler's command, without arguments for the kernels."""
    named = os.environ.get("CXX", "").strip() or "g++"
    try:
        compiler = shlex.split(named)
    except ValueError as error:
        raise BuildError(f"$CXX is {named!r}, which is no command: {error}") from error
    if shutil.which(compiler[0]) is None:
        raise BuildError(f"there is no C++ compiler {named!r} ($CXX names another)")
    return compiler


def _compile(compiler: list[str], march: str, sources: Iterable[Path], folder: Path) -> None:
    """Compile all sources in parallel, and link them without an OpenMP runtime: the process has torch's."""
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
    """Return a digest of everything that the library depends on: different machines may share one cache."""
    parts = [march, *FLAGS, *compiler, _cpu() if march == "native" else ""]
    for program in filter(None, map(shutil.which, compiler)):  # ccache and the compiler that it calls
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
