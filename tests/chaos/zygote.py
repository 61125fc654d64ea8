"""Forks all processes of a run from a program that has imported everything, so that a start is cheap.

Run as `python -m tests.chaos.zygote`: requests are JSON lines on stdin; starts and ends of children are
reported on stdout. Nothing is computed before a fork. It ends with its stdin, and its children end with it,
even after `kill -9`: each waits for the end of a pipe that only the zygote holds open. `Zygote` is the
harness's end.
"""

import asyncio
import contextlib
import gc
import json
import os
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path


def roles() -> dict[str, Callable]:
    """The roles of children. Imports everything that they need."""
    import tests.tiny_models  # noqa: F401
    from tests.chaos import consumers, forgers, producers, reference, workers

    return {
        "worker": workers.run,
        "producer": producers.run,
        "consumer": consumers.run,
        "forger": forgers.run,
        "reference": reference.run,
    }


def main() -> None:
    known = roles()
    gc.freeze()
    life = os.pipe()
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    names: dict[int, str] = {}
    rest = b""
    say(ready=True)
    while True:
        readable, _, _ = select.select([0, woken], [], [])
        if woken in readable:
            os.read(woken, 4096)
            _report_ended(names)
        if 0 in readable:
            chunk = os.read(0, 65536)
            if not chunk:
                os._exit(0)
            *lines, rest = (rest + chunk).split(b"\n")
            for request in map(json.loads, lines):
                pid = os.fork()
                if pid == 0:
                    signal.set_wakeup_fd(-1)
                    _become(known[request["role"]], life, request)
                names[pid] = request["name"]
                say(started=request["name"], pid=pid)


def say(**message) -> None:
    print(json.dumps(message), flush=True)


def _report_ended(names: dict[int, str]) -> None:
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            say(ended=names.pop(ended[0]), status=os.waitstatus_to_exitcode(ended[1]))


def _become(role: Callable, life: tuple[int, int], request: dict) -> None:
    """Run a role in a child. Never returns."""
    status = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.close(life[1])
        os.setsid()
        null, log = (
            os.open(os.devnull, os.O_RDONLY),
            os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND),
        )
        for ours, standard in ((null, 0), (log, 1), (log, 2)):
            os.dup2(ours, standard)
        threading.Thread(target=_end_with, args=(life[0],), daemon=True).start()
        role(**request["options"])
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _end_with(life: int) -> None:
    os.read(life, 1)
    os._exit(99)


class Zygote:
    """The harness's handle.

    Calls `on_end(name, status)` for each child that ends; a signal has a negative status.
    """

    def __init__(self, folder: Path, on_end: Callable[[str, int], None]):
        self._folder, self._on_end = folder, on_end
        self.pids: dict[str, int] = {}
        self._waiting: dict[str, asyncio.Future] = {}

    async def start(self) -> "Zygote":
        pipe = asyncio.subprocess.PIPE
        self._program = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.chaos.zygote",
            stdin=pipe, stdout=pipe, start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        )  # fmt: skip
        if not await self._program.stdout.readline():
            raise RuntimeError("the zygote did not start")
        self._listener = asyncio.create_task(self._listen())
        return self

    async def spawn(self, name: str, role: str, **options) -> int:
        started = self._waiting[name] = asyncio.get_running_loop().create_future()
        self.log(name).touch()  # the child may be killed before it opens its log
        request = {"name": name, "role": role, "log": str(self.log(name)), "options": options}
        self._program.stdin.write(json.dumps(request).encode() + b"\n")
        return await started

    def log(self, name: str) -> Path:
        return self._folder / f"{name}.log"

    def signal(self, name: str, signum: int) -> bool:
        """Send a signal. Returns True if the process was alive."""
        if name not in self.pids:
            return False
        os.kill(self.pids[name], signum)
        return True

    async def stop(self) -> None:
        self._program.stdin.close()
        await self._program.wait()
        await self._listener

    async def _listen(self) -> None:
        while line := await self._program.stdout.readline():
            match json.loads(line):
                case {"started": name, "pid": pid}:
                    self.pids[name] = pid
                    self._waiting.pop(name).set_result(pid)
                case {"ended": name, "status": status}:
                    del self.pids[name]
                    self._on_end(name, status)


if __name__ == "__main__":
    main()
