"""Gateways as processes of their own, which a test can kill."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ingine.worker.child import Child
from tests.waiting import wait_until

READY = re.compile(r"gateway ready: (http://\S+),")


class GatewayProcess:
    """`ingine gateway` on a free port."""

    def __init__(self, log: Path, redis_url: str, queue: str, **settings: object):
        """settings: fields of GatewaySettings without their prefix."""
        self._log = log
        variables = {f"INGINE_GATEWAY_{name.upper()}": str(value) for name, value in settings.items()}
        variables |= {"INGINE_REDIS_URL": redis_url, "INGINE_QUEUE": queue}
        with log.open("wb") as output:
            command = [sys.executable, "-P", "-m", "ingine.cli.main", "gateway", "--port", "0"]
            self.child = Child(command, output=output, env=os.environ | variables)
        self.url: str = wait_until(self._url, what=f"a gateway that logs to {log}")

    def _url(self) -> str | None:
        text = self._log.read_text()
        assert self.child.running, text
        return found[1] if (found := READY.search(text)) else None

    @property
    def log_text(self) -> str:
        return self._log.read_text()


@contextmanager
def gateway_process(folder: Path, redis_url: str, queue: str, **settings: object) -> Iterator[GatewayProcess]:
    log = folder / f"gateway-{len(list(folder.glob('gateway-*')))}.log"
    gateway = GatewayProcess(log, redis_url, queue, **settings)
    try:
        yield gateway
    finally:
        gateway.child.stop()
