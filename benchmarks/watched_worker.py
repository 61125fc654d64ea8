"""Run `ingine worker` with a watch on its event loop, for `admission_cost.py`.

For each line on standard input it prints a line of JSON about the time since the previous one: the longest
time for which the loop scheduled no task, and the processor time of the whole process.

It runs the package that is first on PYTHONPATH.
"""

import asyncio
import json
import resource
import sys
import threading
import time

TICK_S = 0.001


class Watch:
    """A task of the loop that records when it is scheduled late."""

    def __init__(self) -> None:
        self.longest_s = 0.0

    async def run(self) -> None:
        before = time.perf_counter()
        while True:
            await asyncio.sleep(TICK_S)
            now = time.perf_counter()
            self.longest_s = max(self.longest_s, now - before - TICK_S)
            before = now

    def answer(self) -> None:
        used_before = 0.0
        for _ in sys.stdin:
            used = resource.getrusage(resource.RUSAGE_SELF)
            cpu_s = used.ru_utime + used.ru_stime
            longest_s, self.longest_s = self.longest_s, 0.0
            print(
                json.dumps({"longest_ms": longest_s * 1000, "cpu_ms": (cpu_s - used_before) * 1000}),
                flush=True,
            )
            used_before = cpu_s


def main() -> None:
    import ingine.cli.worker
    import ingine.worker.worker
    from ingine.worker.settings import load_settings

    watch, run = Watch(), ingine.worker.worker.Worker.run

    async def run_watched(self) -> None:
        watching = asyncio.create_task(watch.run())
        try:
            await run(self)
        finally:
            watching.cancel()

    ingine.worker.worker.Worker.run = run_watched
    threading.Thread(target=watch.answer, daemon=True).start()
    ingine.cli.worker.run_worker(load_settings())


if __name__ == "__main__":
    main()
