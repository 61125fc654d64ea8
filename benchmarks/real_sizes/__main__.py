"""Compares ingine with llama.cpp on models of the sizes that people serve, with random weights.

    python -m benchmarks.real_sizes --help

README.md says what is measured and how.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.machine import machine, report_text
from benchmarks.real_sizes.folders import write_folder
from benchmarks.real_sizes.gguf_models import write_gguf
from benchmarks.real_sizes.lineup import Entry, entries
from benchmarks.real_sizes.memory import PeakAnonymous, memory_of
from benchmarks.real_sizes.rates import rates
from benchmarks.real_sizes.shapes import SHAPES, Shape
from benchmarks.rivals.child import ROOT, Child, SystemFailed
from benchmarks.rivals.protocol import Request
from benchmarks.rivals.workloads import slices
from ingine.engine.store.model_store import DEFAULT_MODEL, resolve_model
from ingine.engine.text.tokenizer import Tokenizer

LOAD_TIMEOUT_S = 1800
COMPILE_TIMEOUT_S = 600
GB = 1e9


def main(
    models: Annotated[str, typer.Option(help=f"By comma: {', '.join(SHAPES)}.")] = ",".join(SHAPES),
    only: Annotated[str, typer.Option(help='Entries whose name has this in it, such as "Q4_0".')] = "",
    streams: Annotated[str, typer.Option(help="How many at once, by comma.")] = "1,8,32",
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 512,
    new: Annotated[int, typer.Option(min=2, help="New tokens of each request.")] = 32,
    rounds: Annotated[int, typer.Option(min=1)] = 1,
    layers: Annotated[int | None, typer.Option(min=1, help="Cut the models to so many, to try it.")] = None,
    limit_s: Annotated[float, typer.Option(help="A run that takes longer has failed.")] = 3600,
    folder: Annotated[
        Path | None, typer.Option(help="Where the models are made and kept. Default: made anew and removed.")
    ] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Where figures go.")] = None,
) -> None:
    """Make the models, then measure loading, prefill and decoding of each engine, in turns."""
    shapes = {name: _cut(SHAPES[name], layers) for name in models.split(",")}
    num_streams = sorted(map(int, streams.split(",")))
    chosen = [entry for entry in entries(list(shapes)) if only in entry.name]
    tokenizer = resolve_model(DEFAULT_MODEL) / "tokenizer.json"
    prompts = slices(Tokenizer.from_folder(tokenizer.parent), [prompt] * num_streams[-1])
    requests = [Request(token_ids, new) for token_ids in prompts]
    report: dict[str, Any] = {
        "machine": machine(),
        "prompt_tokens": prompt,
        "new_tokens": new,
        "layers": {name: shape.num_layers for name, shape in shapes.items()},
        "results": [],
    }
    with _scratch(folder) as scratch:
        _compile_kernels(scratch)
        for round_number in range(rounds):
            for entry in chosen:
                shape = shapes[entry.model]
                result = {"model": entry.model, "system": entry.name, "round": round_number}
                path = _made(scratch, entry, shape, tokenizer)
                result |= _measure(entry, shape, path, requests, num_streams, limit_s, scratch)
                print(_line(result), flush=True)
                report["results"].append(result)
                if json_path:
                    json_path.write_text(report_text(report))


def _cut(shape: Shape, layers: int | None) -> Shape:
    return replace(shape, num_layers=layers) if layers else shape


@contextmanager
def _scratch(folder: Path | None) -> Iterator[Path]:
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder.resolve()
        return
    (ROOT / ".rivals").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / ".rivals", prefix="real-sizes-") as made:
        yield Path(made)


def _cache(scratch: Path) -> dict[str, str]:
    """ingine's cache, in `scratch`, so that files made from the models are deleted with them."""
    return {"INGINE_CACHE_DIR": str(scratch / "cache")}


def _compile_kernels(scratch: Path) -> None:
    """Compile the kernels once, or it would count for the first load."""
    command = [sys.executable, "-c", "from ingine.engine.kernels import native; native.library()"]
    subprocess.run(command, cwd=ROOT, env=os.environ | _cache(scratch), check=True, timeout=COMPILE_TIMEOUT_S)


def _made(scratch: Path, entry: Entry, shape: Shape, tokenizer: Path) -> Path:
    """The model's file or folder, made if it is missing. Afterwards it is in the page cache."""
    name = f"{shape.name}-{shape.num_layers}-layers-{entry.weights}"
    if entry.weights == "bf16":
        path = scratch / name
        if not path.exists():
            write_folder(path, shape, tokenizer=tokenizer)
    else:
        path = scratch / f"{name}.gguf"
        if not path.exists():
            write_gguf(path, shape, entry.weights, tokenizer=tokenizer)
    return path


def _measure(
    entry: Entry,
    shape: Shape,
    path: Path,
    requests: Sequence[Request],
    num_streams: Sequence[int],
    limit_s: float,
    scratch: Path,
) -> dict[str, Any]:
    """Load one engine, and measure its memory, and its rates by number of streams."""
    result: dict[str, Any] = {"weights_bytes": _size(path), "streams": {}}
    longest = len(requests[0].prompt) + requests[0].num_tokens
    options = entry.options(shape, path, num_seqs=num_streams[-1], num_tokens=longest)
    child = Child(
        [str(ROOT / entry.venv / "bin" / "python"), "-m", entry.module],
        env=_cache(scratch),
        log_path=scratch / "log",
    )
    try:
        begun = time.perf_counter()
        with PeakAnonymous(child.pid) as peak:
            said = child.load(str(path), options, timeout_s=LOAD_TIMEOUT_S)
        result |= {"load_s": time.perf_counter() - begun, "peak_anonymous_bytes": peak.num_bytes}
        result |= {"loaded": memory_of(child.pid)}
        result |= {"versions": said["versions"], "settings": said["settings"]}
        child.run([requests[0]._replace(num_tokens=2)], timeout_s=limit_s)
        for num in num_streams:
            answer = child.run(requests[:num], timeout_s=limit_s)
            figures = rates(requests[:num], answer["token_times_s"])
            result["streams"][num] = figures | {"first_token_ids": answer["first_token_ids"]}
        result["at_end"] = memory_of(child.pid)
    except SystemFailed as error:
        result["error"] = str(error)
    finally:
        child.close()
    return result


def _size(path: Path) -> int:
    files = path.glob("*.safetensors") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def _line(result: dict[str, Any]) -> str:
    words = [f"{result['model']:5} {result['system']:24} round {result['round'] + 1} "]
    if "load_s" in result:
        words.append(f"weights {result['weights_bytes'] / GB:.2f} GB, loaded in {result['load_s']:.1f} s;")
        words.append(f"anonymous at most {result['peak_anonymous_bytes'] / GB:.2f}")
    for when in ("loaded", "at_end"):
        held = result.get(when, {})
        words += [f"{when}:"] if held else []
        words += [f"{name.removesuffix('_bytes')} {size / GB:.2f}" for name, size in held.items()]
    for num, figures in result.get("streams", {}).items():
        decode = figures.get("decode_tokens_per_s")
        words.append(
            f"| {num}: {figures['tokens_per_s']:.1f} tok/s, prefill {figures['prefill_tokens_per_s']:.0f}, "
            f"decode {f'{decode:.1f}' if decode else 'none'}"
        )
    if "error" in result:
        words.append(f"error: {result['error']}")
    return " ".join(words)


if __name__ == "__main__":
    typer.run(main)
