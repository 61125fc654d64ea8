"""Measures the time from the start of a process to its first token: `python benchmarks/start_time.py`.

    [--model NAME] [--rounds 5] [--warm-only] [--imports-only] [--json PATH]

    engine  a script that makes an `LLM` and generates one token
    worker  `ingine worker` with a job waiting in its queue, until the token's event is with a consumer
    import  `import ingine.producer`, `from ingine import Client`, `ingine --help`, and `ingine status` of a
            server that is away: least of 20 fresh processes each, in turns

The first two each with a warm page cache and a cold one. Cold means that the kernel was asked to drop what
they read, which it does not do for files that other processes have mapped: how much then came from the disk
is in the table. Medians of `--rounds` fresh processes of each, taking turns; and what the time of the engine
goes into.
"""

import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from machine import machine
from rivals.page_cache import evict

from ingine.engine.store.model_store import DEFAULT_MODEL, resolve_model
from ingine.producer import Client
from ingine.worker.embedded import EmbeddedServer

IMPORT_ROUNDS = 20
INGINE = [sys.executable, "-m", "ingine"]
IMPORTS = {
    "python": [sys.executable, "-c", "pass"],
    "import ingine.producer": [sys.executable, "-c", "import ingine.producer"],
    "from ingine import Client": [sys.executable, "-c", "from ingine import Client"],
    "ingine --help": [*INGINE, "--help"],
    "ingine status": [*INGINE, "status", "x", "--redis-url", "redis://127.0.0.1:1/0"],
}
PROMPT = "What is the capital of France?"
CHILD = Path(__file__).with_name("first_token.py")


def start_engine(model: str) -> dict:
    command = [sys.executable, str(CHILD), model, PROMPT, str(time.time())]
    ended = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    run = json.loads(ended.stdout)
    return run | {"seconds": sum(run["parts"].values())}


def start_worker(model: str, server: EmbeddedServer) -> dict:
    """Start a worker with a job in a queue of its own, which no worker of another run reads."""
    queue = f"start-{time.time_ns()}"
    command = [sys.executable, "-m", "ingine.cli.main", "worker", "--model", model, "--queue", queue]
    command += ["--redis-url", server.url, "--http-port", "-1", "--log-level", "warning"]
    with Client(server.url, queue=queue) as client:
        job = client.submit(PROMPT, temperature=0, max_tokens=1)
        began = time.time()
        worker = subprocess.Popen(command)
        try:
            next(chunk for chunk in job.stream() if chunk.position > 0)
            return {"seconds": time.time() - began}
        finally:
            worker.terminate()
            worker.wait()


def drop_from_page_cache(model: str) -> None:
    """Drop all files that a start reads: the packages, Python's library and the model."""
    folders = [folder for folder in map(Path, sys.path) if folder.is_dir()]
    # A hub's folder links to files elsewhere.
    evict([*folders, *(path.resolve() for path in resolve_model(model).iterdir())])


def measure(start: Callable[[], dict]) -> dict:
    """Measure one run: its time, processor seconds, and MiB read from disk."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = start()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return run | {"cpu_s": cpu_s, "read_mib": (after.ru_inblock - before.ru_inblock) * 512 / 2**20}


def main(
    model: Annotated[str, typer.Option(help="As of `ingine worker`.")] = DEFAULT_MODEL,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    warm_only: Annotated[bool, typer.Option("--warm-only", help="Leave the page cache alone.")] = False,
    imports_only: Annotated[
        bool, typer.Option("--imports-only", help="No model: what commands and the producer import.")
    ] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures here too.")] = None,
) -> None:
    report_imports(imports := measure_imports())
    runs = {} if imports_only else measure_starts(model, rounds, warm_only)
    if runs:
        report(runs)
    if json_path:
        found = {"machine": machine(), "model": model, "imports": imports, "runs": runs}
        json_path.write_text(json.dumps(found, indent=2) + "\n")


def measure_imports() -> dict[str, dict[str, float]]:
    """Minimum wall and processor seconds of each import: other work on the machine can only add time."""
    least: dict[str, dict[str, float]] = {}
    for _ in range(IMPORT_ROUNDS):
        for name, command in IMPORTS.items():
            run = measure(lambda command=command: run_quietly(command))
            seen = least.setdefault(name, {"seconds": math.inf, "cpu_s": math.inf})
            least[name] = {figure: min(seen[figure], run[figure]) for figure in seen}
    return least


def run_quietly(command: list[str]) -> dict:
    began = time.monotonic()
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    return {"seconds": time.monotonic() - began}


def report_imports(least: dict[str, dict[str, float]]) -> None:
    print(f"{'least of ' + str(IMPORT_ROUNDS):<30}{'s':>8}{'CPU s':>8}")
    for name, figures in least.items():
        print(f"{name:<30}{figures['seconds']:>8.3f}{figures['cpu_s']:>8.3f}")
    print()


def measure_starts(model: str, rounds: int, warm_only: bool) -> dict[str, list[dict]]:
    """The runs by program and state of the page cache."""
    with (
        TemporaryDirectory(prefix="ingine-start-") as folder,
        EmbeddedServer(Path(folder, "valkey")) as server,
    ):
        starts = {"engine": lambda: start_engine(model), "worker": lambda: start_worker(model, server)}
        for start in starts.values():
            start()  # compilation and conversion at the very first start are not measured
        runs: dict[str, list[dict]] = {}
        for _ in range(rounds):
            for cache in ("warm",) if warm_only else ("warm", "cold"):
                for name, start in starts.items():
                    if cache == "cold":
                        drop_from_page_cache(model)
                    runs.setdefault(f"{name}, {cache}", []).append(measure(start))
    return runs


def report(runs: dict[str, list[dict]]) -> None:
    print(f"{'':<24}{'median s':>10}{'least':>8}{'most':>8}{'CPU s':>8}{'MiB read':>10}")
    for name, each in runs.items():
        seconds = [run["seconds"] for run in each]
        print(
            f"{name:<24}{median(seconds):>10.2f}{min(seconds):>8.2f}{max(seconds):>8.2f}"
            f"{median(run['cpu_s'] for run in each):>8.2f}{median(run['read_mib'] for run in each):>10.0f}"
        )
    print("\nThe engine with a warm cache, median s:")
    warm = runs["engine, warm"]
    for part in warm[0]["parts"]:
        print(f"  {part:<24}{median(run['parts'][part] for run in warm):>8.2f}")
    if heavy := warm[0]["heavy_imports"]:
        print(f"  imported: {', '.join(heavy)}")


if __name__ == "__main__":
    typer.run(main)
