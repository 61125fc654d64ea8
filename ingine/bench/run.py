"""Runs all modes in turns, so that noise on the machine affects all of them alike."""

import json
import os
import platform
from collections import defaultdict
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from ingine import __version__
from ingine.bench.measure import Measurement, median
from ingine.bench.modes import continuous, load_hugging_face, one_at_a_time
from ingine.bench.through_redis import through_redis, worker_on_own_server
from ingine.bench.workload import NUM_OUTPUT_TOKENS, PROMPT_LENGTHS, make_workload
from ingine.engine.config import EngineConfig
from ingine.engine.engine import Engine
from ingine.engine.models.config import ModelConfig
from ingine.engine.run.device import select_device, select_dtype
from ingine.engine.store.model_store import resolve_model
from ingine.engine.text.tokenizer import required
from ingine.errors import ConfigError

BATCH_SIZES = (8, 32)
MAX_MODEL_LEN = 512
TABLE_WIDTH = 80
HF, ONE = "HF sequential", "ours sequential"
CONTINUOUS, REDIS = "ours continuous", "ours through Redis"

Results = dict[tuple[str, int], list[Measurement]]


def run(console: Console, *, model: str, num_rounds: int, json_path: Path) -> None:
    """Measure all modes, and print each measurement and then medians. Writes all of it to `json_path`."""
    _make_writable(json_path)
    folder = resolve_model(model)
    device = select_device("auto")
    dtype = select_dtype("auto", device, ModelConfig.from_folder(folder).dtype)
    options = {
        "model": model,
        "max_num_seqs": max(BATCH_SIZES),
        "max_model_len": _max_model_len(folder),
        # Rounds repeat their prompts: cached prefixes would make ours faster than it is.
        "enable_prefix_caching": False,
    }
    engine = Engine(EngineConfig(**options))
    hugging_face = load_hugging_face(folder, device=device, dtype=dtype)
    results: Results = defaultdict(list)
    with worker_on_own_server(**options) as url:
        modes = {
            HF: hugging_face,
            ONE: lambda prompts: one_at_a_time(engine, prompts),
            CONTINUOUS: lambda prompts: continuous(engine, prompts),
            REDIS: lambda prompts: through_redis(url, prompts),
        }
        for measure in modes.values():
            measure(make_workload(required(engine.tokenizer), 2))
        for round_number in range(num_rounds):
            for num_requests in BATCH_SIZES:
                prompts = make_workload(required(engine.tokenizer), num_requests)
                for mode, measure in modes.items():
                    if mode == HF and round_number > 0:
                        continue  # it takes minutes, and hardly varies
                    results[mode, num_requests].append(measure(prompts))
                    _print_progress(console, round_number, mode, results[mode, num_requests][-1])
    print_table(console, results)
    for name, ratio in _ratios(results).items():
        console.print(f"{name}: {ratio:.2f}x", highlight=False)
    json_path.write_text(json.dumps(_as_json(results, model, device, dtype), indent=2) + "\n")
    console.print(f"written to {json_path}", highlight=False)


def _print_progress(console: Console, round_number: int, mode: str, measured: Measurement) -> None:
    console.print(
        f"round {round_number + 1}  {mode:20} {measured.num_requests:3} requests "
        f"{measured.wall_s:7.2f} s {measured.tokens_per_s:7.1f} tok/s",
        highlight=False,
    )


def _make_writable(path: Path) -> None:
    """Raise ConfigError if the file cannot be written, before minutes of measurements."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        raise ConfigError(f"--json: {path} cannot be written: {error.strerror}") from None


def _max_model_len(folder: Path) -> int:
    """The model length to use. Raises ConfigError if the model's is too small for the workload."""
    longest = ModelConfig.from_folder(folder).max_position_embeddings
    needed = max(PROMPT_LENGTHS) + NUM_OUTPUT_TOKENS
    if longest < needed:
        raise ConfigError(f"the benchmark's requests take {needed} tokens, and this model {longest} at most")
    return min(MAX_MODEL_LEN, longest)


def print_table(console: Console, results: Results) -> None:
    """Print the table at least 80 columns wide: a narrower terminal wraps lines, but cuts no figure off."""
    console.width = max(console.width, TABLE_WIDTH)
    console.print(_table(results), crop=False)


def _table(results: Results) -> Table:
    table = Table(
        title=f"{NUM_OUTPUT_TOKENS} tokens a request, greedy; medians; seconds from t = 0",
        box=SIMPLE,
        padding=0,
    )
    table.add_column("mode", no_wrap=True)
    for heading in ("requests", "wall", "tok/s", "latency\np50", "latency\np95", "first\np50", "first\np95"):
        table.add_column(heading, justify="right", no_wrap=True)
    for (mode, num_requests), rounds in sorted(results.items(), key=lambda item: item[0][1]):
        m = median(rounds)
        times = (m.latency_p50_s, m.latency_p95_s, m.first_token_p50_s, m.first_token_p95_s)
        cells = (f"{num_requests}", f"{m.wall_s:.2f}", f"{m.tokens_per_s:.1f}")
        table.add_row(mode, *cells, *(f"{time_s:.2f}" for time_s in times))
    return table


def _ratios(results: Results) -> dict[str, float]:
    rate = {key: median(rounds).tokens_per_s for key, rounds in results.items()}
    pairs = ((CONTINUOUS, ONE), (CONTINUOUS, HF), (REDIS, CONTINUOUS))
    return {
        f"{first} / {second}, {n} requests": rate[first, n] / rate[second, n]
        for n in BATCH_SIZES
        for first, second in pairs
    }


def _as_json(results: Results, model: str, device: torch.device, dtype: torch.dtype) -> dict:
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "ingine": __version__,
        "machine": {
            "platform": platform.platform(),
            "cpus": os.cpu_count(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "dtype": str(dtype).removeprefix("torch."),
            "torch": torch.__version__,
            "torch_threads": torch.get_num_threads(),
        },
        "model": model,
        "num_output_tokens": NUM_OUTPUT_TOKENS,
        "results": [
            {
                "mode": mode,
                "num_requests": num_requests,
                "median": asdict(median(rounds)),
                "rounds": [asdict(measured) for measured in rounds],
            }
            for (mode, num_requests), rounds in results.items()
        ],
        "ratios": _ratios(results),
    }
