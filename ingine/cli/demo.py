"""The command `ingine demo`."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer


def demo(
    model: Annotated[str | None, typer.Option(help="As for `ingine worker`. Default: SmolLM2-135M.")] = None,
    redis_url: Annotated[
        str | None, typer.Option(help="Use this server instead of one that lives as long as the demo.")
    ] = None,
) -> None:
    """Kill one of two workers amid dozens of chats; lose no token.

    Pulls the model if it is absent, submits everything at once from several producers, shows the streams side
    by side, kills a worker with `kill -9` in mid-generation, and compares every consumer's tokens with the
    token log. Takes a minute or two. Exit status 0 only if every job finished, some of them on another worker
    than they began on, and nothing was lost or repeated.
    """
    from rich.console import Console

    from ingine.demo.run import run
    from ingine.engine.store.model_store import DEFAULT_MODEL, made_folder

    folder = made_folder(model or DEFAULT_MODEL) or _pull(model)
    if not run(Console(), folder=folder, redis_url=redis_url):
        raise typer.Exit(1)


def _pull(model: str | None) -> Path:
    """Pull the model in another process, since the demo itself does not need torch. Returns its folder."""
    # -P: it imports no module from the current folder.
    command = [sys.executable, "-P", "-m", "ingine.cli.main", "pull", *([model] if model else [])]
    pulled = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    if pulled.returncode:
        raise typer.Exit(pulled.returncode)
    return Path(os.fsdecode(pulled.stdout).removesuffix("\n"))
