"""`ingine bench`."""

from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer


def bench(
    model: Annotated[str | None, typer.Option(help="As of `ingine worker`. Default: SmolLM2-135M.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of each mode but HF, which runs once.")] = 3,
    json: Annotated[
        Path | None, typer.Option(help="Where results go. Default: benchmarks/results/bench-<time>.json.")
    ] = None,
) -> None:
    """Measure what continuous batching brings, and what Redis costs.

    Four modes on the same mixed workload of 8 requests and of 32, in turns: Hugging Face one request after
    the other, ours likewise, ours in one continuous batch, and that through a real server and worker. Wall
    time, tokens a second, latency of each request and time to its first token, from t = 0. Takes minutes.
    """
    from rich.console import Console

    from ingine.bench.run import run
    from ingine.engine.store.model_store import DEFAULT_MODEL

    path = json or Path("benchmarks", "results", f"bench-{datetime.now():%Y%m%d-%H%M%S}.json")
    run(Console(), model=model or DEFAULT_MODEL, num_rounds=rounds, json_path=path)
