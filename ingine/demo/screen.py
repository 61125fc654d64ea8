"""The demo's output: streams side by side on a terminal of any size, plain lines elsewhere."""

import textwrap
import time
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ingine.demo.streams import Stream
from ingine.terminal import visible

MIN_CELL_WIDTH, MIN_CELL_HEIGHT = 34, 6
FOOTER_HEIGHT = 4
PLAIN_STATUS_EVERY_S = 5.0


class LiveScreen:
    """Fills the terminal with as many streams as fit, the last messages, and the progress."""

    def __init__(self, console: Console, streams: list[Stream]):
        self._console = console
        self._streams = streams
        self._messages: list[str] = []
        self._cells: list[Stream] = []
        self._live = Live(console=console, screen=True, auto_refresh=False)

    def __enter__(self) -> Self:
        self._started = time.monotonic()
        self._live.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._live.__exit__(*error)
        for message in self._messages:  # they vanished with the alternate screen
            self._console.print(Text(message))

    def say(self, message: str) -> None:
        self._messages.append(visible(message))
        self.draw()

    def tell(self, message: str) -> None:
        """Ignore a message about one stream: its cell shows the same."""

    def draw(self) -> None:
        self._live.update(self.render(*self._console.size), refresh=True)

    def render(self, width: int, height: int) -> RenderableType:
        footer = self._footer(min(height, FOOTER_HEIGHT))
        columns, rows, cell_height = grid_shape(width, height - FOOTER_HEIGHT)
        cells = self._choose(columns * rows)
        grid = Table.grid(expand=True)
        for _ in range(columns):
            grid.add_column(ratio=1)
        cell_width = width // columns - 4
        for row in range(rows):
            panels = [_cell(s, cell_width, cell_height) for s in cells[row * columns : (row + 1) * columns]]
            grid.add_row(*panels)
        return Group(grid, footer) if rows else footer

    def _choose(self, num_cells: int) -> list[Stream]:
        """Choose the streams to show. Each keeps its cell until it has ended and another needs the cell."""
        shown = self._cells[:num_cells]
        waiting = [s for s in self._streams if s not in shown]
        waiting.sort(key=lambda s: (not s.running, bool(s.ending), s.number))
        for index, stream in enumerate(shown):
            if stream.ending and waiting and waiting[0].running:
                shown[index] = waiting.pop(0)
        shown += waiting[: num_cells - len(shown)]
        self._cells = shown
        return shown

    def _footer(self, height: int) -> RenderableType:
        num_tokens, _, _ = _progress(self._streams)
        remaining = sum(s.question.max_tokens - s.position for s in self._streams if not s.ending)
        bar = ProgressBar(total=max(1, num_tokens + remaining), completed=num_tokens)
        texts = [*self._messages[-2:], _status(self._streams, self._started)]
        *messages, status = [Text(text, no_wrap=True, overflow="ellipsis") for text in texts]
        footer = Table.grid(expand=True)
        for line in (*messages, bar, status)[-height:]:
            footer.add_row(line)
        return footer


class PlainScreen:
    """Prints one line per event, for pipes, files and dumb terminals."""

    def __init__(self, console: Console, streams: list[Stream]):
        self._console = console
        self._streams = streams

    def __enter__(self) -> Self:
        self._started = self._last_status = time.monotonic()
        return self

    def __exit__(self, *_) -> None:
        pass

    def say(self, message: str) -> None:
        self._console.print(Text(visible(message)), soft_wrap=True)

    tell = say

    def draw(self) -> None:
        if time.monotonic() - self._last_status > PLAIN_STATUS_EVERY_S:
            self._last_status = time.monotonic()
            self.say(_status(self._streams, self._started))


def open_screen(console: Console, streams: list[Stream]) -> LiveScreen | PlainScreen:
    plain = not console.is_terminal or console.is_dumb_terminal
    return (PlainScreen if plain else LiveScreen)(console, streams)


def grid_shape(width: int, height: int) -> tuple[int, int, int]:
    """Columns, rows and the height of a cell. There are 0 rows if not even a cell with one line fits."""
    columns = max(1, width // MIN_CELL_WIDTH)
    if height < 3:
        return columns, 0, 0
    rows = max(1, height // MIN_CELL_HEIGHT)
    return columns, rows, height // rows


def _cell(stream: Stream, width: int, height: int) -> Panel:
    style, state = "dim", "waits"
    if stream.ending:
        style, state = ("green", "done") if stream.ending == "finished" else ("red", "failed")
    elif stream.interrupted_at is not None and not stream.resumed:
        style, state = "bold red", "worker killed"
    elif stream.running:
        style, state = "cyan", ""
    if stream.resumed:
        state = f"went on after {stream.interrupted_at} {state}".rstrip()
    if stream.position:
        state = f"{stream.position} tokens {state}".rstrip()
    return Panel(
        Text("\n".join(_tail(stream.text, max(1, width), height - 2)), no_wrap=True, overflow="crop"),
        title=Text(f"{stream.number + 1} {stream.question.priority}"),
        subtitle=Text(state),
        border_style=style,
        height=height,
    )


def _tail(text: str, width: int, height: int) -> list[str]:
    """The last lines of `text`, wrapped, without control characters, which could move the cursor."""
    recent = "".join(c if c.isprintable() or c == "\n" else " " for c in text[-2 * width * height :])
    lines = [line for paragraph in recent.split("\n") for line in textwrap.wrap(paragraph, width) or [""]]
    return lines[-height:]


def _progress(streams: list[Stream]) -> tuple[int, int, int]:
    return sum(s.position for s in streams), sum(bool(s.ending) for s in streams), len(streams)


def _status(streams: list[Stream], started: float) -> str:
    num_tokens, num_ended, total = _progress(streams)
    running = sum(s.running for s in streams)
    elapsed_s = time.monotonic() - started
    return f"{elapsed_s:.0f} s · {num_ended}/{total} finished · {running} streaming · {num_tokens:,} tokens"
