"""Runs the board: reads the queue each second, draws, and does what the keys ask for."""

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from rich.console import Console, Group
from rich.live import Live

from ingine.errors import ClientError
from ingine.producer import AsyncClient
from ingine.producer.home import end_tasks
from ingine.producer.watch import QueueWatch
from ingine.top.board import Action, Board, Verb
from ingine.top.figures import History
from ingine.top.frame import frame
from ingine.top.keys import decode_keys, single_keys

READ_EVERY_S = 1.0
SAMPLE_EVERY_S = 5.0
"""How often the tenants of waiting jobs are counted."""
DRAW_EVERY_S = 0.5
"""The board is drawn this often at least, so that it says how old it is."""


async def print_once(client: AsyncClient, console: Console) -> None:
    """Print one frame, as long as it needs to be. Raises ServerUnavailable."""
    watch, board = QueueWatch(client), Board(client.queue, interactive=False)
    snapshot = await watch.read(with_text=False)
    board.tenants = await watch.waiting_tenants(snapshot.info)
    board.update(snapshot, History().add(snapshot, 0.0), 0.0)
    for line in frame(board, console.width, None, 0.0):
        console.print(line, soft_wrap=True, end="\n")


async def run_board(client: AsyncClient, console: Console) -> None:
    """Show the board until `q` is pressed, or SIGTERM or SIGHUP comes. An outage of the server is shown."""
    with single_keys() as file, Live(console=console, screen=True, auto_refresh=False) as live:
        await _Runner(client, lambda lines: live.update(Group(*lines), refresh=True), console).run(file)


class _Runner:
    def __init__(self, client: AsyncClient, show: Callable[[list], None], console: Console):
        self._client, self._show, self._console = client, show, console
        self._board = Board(client.queue, read_at_s=time.monotonic())
        self._watch, self._history = QueueWatch(client), History()
        self._read_now, self._ended = asyncio.Event(), asyncio.Event()
        self._tasks: set[asyncio.Task] = set()

    async def run(self, file: int | None) -> None:
        """file: where the terminal's keys are read. None: there are none."""
        loops = self._read_always(), self._draw_always(), self._ended.wait()
        self._tasks |= (running := {asyncio.create_task(loop) for loop in loops})
        try:
            with _handled(self._ended.set, self._draw), self._keys(file):
                ended, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in ended:
                task.result()  # raises what it failed with
        finally:
            await end_tasks(self._tasks)

    @contextmanager
    def _keys(self, file: int | None) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        if file is not None:
            loop.add_reader(file, self._read_keys, file)
        try:
            yield
        finally:
            if file is not None:
                loop.remove_reader(file)

    def _read_keys(self, file: int) -> None:
        sent = b""
        with suppress(OSError):  # the terminal is gone
            sent = os.read(file, 1024)
        if not sent:
            self._ended.set()
        for key in decode_keys(sent):
            action = self._board.press(key)
            if action and action.verb is Verb.QUIT:
                return self._ended.set()
            if action:
                task = asyncio.create_task(self._act(action))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            elif key == "t":
                self._read_now.set()
        self._draw()

    async def _act(self, action: Action) -> None:
        self._board.message = f"{action.verb} {action.target} ..."
        try:
            self._board.message = await self._do(action)
        except ClientError as error:
            self._board.message = f"{action.verb}: {error}"
        self._read_now.set()

    async def _do(self, action: Action) -> str:
        """Do what was confirmed. Returns a line that says the outcome."""
        match action.verb:
            case Verb.PAUSE:
                await self._client.pause()
                return "paused"
            case Verb.RESUME:
                await self._client.resume()
                return "resumed"
            case Verb.DRAIN:
                await self._client.drain(action.target)
                return f"worker {action.target} was asked to drain"
        outcome = await self._client.cancel(action.target)
        if outcome == "requested":
            return f"job {action.target} will be cancelled at its worker's next step"
        return f"job {action.target}: {outcome}"

    async def _read_always(self) -> None:
        board, sampled_at_s = self._board, -SAMPLE_EVERY_S
        while True:
            self._read_now.clear()
            try:
                snapshot = await self._watch.read(with_text=board.show_text)
                now_s = time.monotonic()
                if now_s - sampled_at_s >= SAMPLE_EVERY_S:
                    board.tenants, sampled_at_s = await self._watch.waiting_tenants(snapshot.info), now_s
                board.update(snapshot, self._history.add(snapshot, now_s), now_s)
            except ClientError as error:
                board.error = str(error)
            self._draw()
            with suppress(TimeoutError):
                async with asyncio.timeout(READ_EVERY_S):
                    await self._read_now.wait()

    async def _draw_always(self) -> None:
        while True:
            self._draw()
            await asyncio.sleep(DRAW_EVERY_S)

    def _draw(self) -> None:
        width, height = self._console.size
        self._show(frame(self._board, width, height, time.monotonic()))


@contextmanager
def _handled(end: Callable[[], object], draw: Callable[[], None]) -> Iterator[None]:
    """End at SIGTERM and SIGHUP, so that the terminal is restored, and draw when it has another size."""
    loop = asyncio.get_running_loop()
    handlers = {"SIGTERM": end, "SIGHUP": end, "SIGWINCH": draw}
    numbers = {getattr(signal, name): handler for name, handler in handlers.items() if hasattr(signal, name)}
    for number, handler in numbers.items():
        loop.add_signal_handler(number, handler)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
