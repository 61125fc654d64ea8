"""Fuzz bytes at the metrics port: they may cost a connection, but no line in the log."""

import contextlib
import functools
import io
import socket
import struct
import threading
import time
from random import Random

from prometheus_client import CollectorRegistry

from benchmarks.fuzz.mutations import damaged
from ingine.worker.http import HttpServer

IN_THREADS = True
"""True: other threads than the one that calls `check` do the work."""
HANGS_S = 30.0

REQUESTS = (
    b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n", b"GET /healthz HTTP/1.0\r\n\r\n", b"GET /readyz\r\n",
    b"GET /x HTTP/1.1\r\nHost: x\r\nConnection: keep-alive\r\n\r\n", b"POST /metrics HTTP/1.1\r\n\r\n",
    b"GET http://x/healthz?y#z HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc", b"HEAD /metrics HTTP/1.1\r\n\r\n",
    b"GET //healthz HTTP/1.1\r\nA: " + b"x" * 999 + b"\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nExpect: 100-continue\r\n\r\n",
)  # fmt: skip
WORDS = (
    b"\r\n", b"\n", b"\r", b" ", b"\x00", b"\xff", b": ", b"HTTP/9.9", b"HTTP/1", b"a: b\r\n" * 150,
    b"x" * 70_000, b"\x16\x03\x01", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET ", b"\x1b[2J",
)  # fmt: skip
WAYS = (b"whole", b"half", b"reset")


def cases(rng: Random) -> bytes:
    raw = b"".join(rng.choice(REQUESTS) for _ in range(rng.choice((1, 1, 1, 2, 5))))
    return rng.choice(WAYS) + b"|" + (damaged(rng, raw, WORDS) if rng.random() < 0.85 else raw)


def check(case: bytes) -> str:
    way, _, raw = case.partition(b"|")
    port, base = _server()
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        answer = _talk(port, way, raw)
        assert _talk(port, b"whole", b"GET /healthz HTTP/1.0\r\n\r\n").endswith(b"ok\n"), "it serves no more"
        _wait_until(lambda: threading.active_count() <= base)
    assert not said.getvalue(), said.getvalue()[-300:]
    if not answer or not answer.startswith(b"HTTP/"):
        return "no answer" if not answer else "an answer without a head"
    assert b"Traceback" not in answer and b"\x1b" not in answer
    return answer.split()[1].decode()


def _talk(port: int, way: bytes, raw: bytes) -> bytes:
    answer = b""
    with (
        socket.create_connection(("127.0.0.1", port), HANGS_S) as client,
        contextlib.suppress(ConnectionError),
    ):
        client.sendall(raw)
        if way == b"reset":
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return answer
        with contextlib.suppress(OSError):  # already answered and closed
            client.shutdown(socket.SHUT_WR)
        while way == b"whole" and (part := client.recv(1 << 16)):
            answer += part
    return answer


def _wait_until(condition) -> None:
    deadline = time.monotonic() + HANGS_S
    while not condition():
        assert time.monotonic() < deadline, "a connection's thread goes on"
        time.sleep(0.001)


@functools.cache
def _server() -> tuple[int, int]:
    """Start a server. Returns its port, and the number of threads without a connection."""
    server = HttpServer("127.0.0.1", 0, CollectorRegistry(), healthy=lambda: None, ready=lambda: "no")
    server.start()
    return server.port, threading.active_count()
