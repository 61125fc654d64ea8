"""The command `ingine bench`."""

from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer


def bench(
    model: Annotated[str | None, typer.Option(help="As for `ingine worker`. Default: SmolLM2-135M.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of each mode except HF, which runs once.")] = 3,
    json: Annotated[
        Path | None, typer.Option(help="File for the results. Default: benchmarks/results/bench-<time>.json.")
    ] = None,
) -> None:
    """Measure the gain of continuous batching, and the cost of Redis.

    Four modes take turns on the same mixed workload of 8 requests and of 32: Hugging Face one request after
    the other, ours likewise, ours in one continuous batch, and that through a real server and worker. It
    reports wall time, tokens per second, and from t = 0 each request's latency and time to first token. Takes
    minutes.
    """
    from rich.console import Console

    from ingine.bench.run import run
    from ingine.engine.store.model_store import DEFAULT_MODEL

    path = json or Path("benchmarks", "results", f"bench-{datetime.now():%Y%m%d-%H%M%S}.json")
    run(Console(), model=model or DEFAULT_MODEL, num_rounds=rounds, json_path=path)
