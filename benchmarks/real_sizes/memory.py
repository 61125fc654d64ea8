"""Memory of a process in bytes, from Linux's /proc, with anonymous and file pages separate.

Pages of a mapped file can be dropped and read again, and all processes that map it share them. Anonymous
pages stay.
"""

import os
import threading
import time
from pathlib import Path

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
INTERVAL_S = 0.02


def memory_of(pid: int) -> dict[str, int]:
    """Memory that is resident now, and its peak, files included (VmHWM)."""
    rollup = _kib(Path(f"/proc/{pid}/smaps_rollup").read_text())
    return {
        "peak_resident_bytes": _kib(Path(f"/proc/{pid}/status").read_text())["VmHWM"],
        "anonymous_bytes": rollup["Anonymous"],
        "file_bytes": rollup["Rss"] - rollup["Anonymous"],
    }


def _kib(text: str) -> dict[str, int]:
    """Parse the fields of `text` that are in kB. Returns bytes."""
    fields = (line.split() for line in text.splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in fields if words[-1:] == ["kB"]}


class PeakAnonymous:
    """Measures the peak anonymous memory of process `pid` within the block, sampled every 20 ms.

    Linux itself only records the peak of all memory.
    """

    def __init__(self, pid: int):
        self._statm = Path(f"/proc/{pid}/statm")
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.num_bytes = 0

    def __enter__(self) -> "PeakAnonymous":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            try:
                _, resident, shared, *_ = map(int, self._statm.read_text().split())
            except (OSError, ValueError):  # the process has ended; its caller reports why
                return
            self.num_bytes = max(self.num_bytes, (resident - shared) * PAGE_BYTES)
            if self._over.is_set():
                return
            time.sleep(INTERVAL_S)
