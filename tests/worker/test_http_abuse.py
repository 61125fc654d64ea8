"""Clients of the metrics port may be hostile: probes are still answered, and the log stays empty."""

import logging
import resource
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import pytest
from prometheus_client import CollectorRegistry, Gauge

from ingine.worker import http
from ingine.worker.http import MAX_CONNECTIONS, MAX_HEAD_BYTES, HttpServer
from tests.waiting import HANGS_S, wait_until

NUM_HALF_OPEN = 1000


@pytest.fixture
def server(caplog) -> Iterator[HttpServer]:
    registry = CollectorRegistry()
    Gauge("answer", "What it is.", registry=registry).set(42)
    server = HttpServer("127.0.0.1", 0, registry, healthy=lambda: None, ready=lambda: "the worker is paused")
    server.start()
    with caplog.at_level(logging.DEBUG):
        yield server
        server.stop()
    assert not [record for record in caplog.records if record.levelno > logging.DEBUG]


def connect(server: HttpServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=HANGS_S)


def exchange(server: HttpServer, sent: bytes) -> bytes:
    """All that the server says to `sent`, until it closes the connection."""
    with connect(server) as connection:
        with suppress(ConnectionError):  # it need not read all of it
            connection.sendall(sent)
        return read_all(connection)


def read_all(connection: socket.socket) -> bytes:
    received = b""
    with suppress(ConnectionError):
        while part := connection.recv(65_536):
            received += part
    return received


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()


@pytest.fixture
def many_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2 * NUM_HALF_OPEN:
        pytest.skip("this process may not open as many files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 4 * NUM_HALF_OPEN), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_thousand_half_open_connections_leave_it_answering(server, many_files):
    num_threads = threading.active_count()
    with ExitStack() as stack:
        for number in range(NUM_HALF_OPEN):
            connection = stack.enter_context(connect(server))
            if number % 2:
                connection.send(b"GET /healthz HTTP/1.1\r\nX-Slow: ")
        assert exchange(server, get("/healthz")).endswith(b"\r\n\r\nok\n")
        assert b"answer 42.0" in exchange(server, get("/metrics"))
        assert len(server._connections) <= MAX_CONNECTIONS
        assert threading.active_count() == num_threads


def test_a_request_that_does_not_come_is_given_up(server, monkeypatch):
    monkeypatch.setattr(http, "TIMEOUT_S", 0.1)
    assert exchange(server, b"GET /healthz HTTP/1.1\r\n") == b""
    assert exchange(server, b"") == b""


def test_an_answer_that_is_not_read_is_given_up(server, monkeypatch):
    monkeypatch.setattr(http, "TIMEOUT_S", 0.1)
    scraped = []
    monkeypatch.setattr(http, "generate_latest", lambda registry: scraped.append(1) or bytes(64 << 20))
    with connect(server) as connection:
        connection.sendall(get("/metrics"))
        wait_until(lambda: scraped, what="the request")
        wait_until(lambda: not server._connections, what="the end of the connection")
        assert len(read_all(connection)) < 64 << 20


def test_a_peer_that_leaves_is_no_event(server):
    for sent in (b"", b"GET /metrics HT", get("/metrics")):
        connection = connect(server)
        connection.sendall(sent)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # ends with a reset
        connection.close()
    assert exchange(server, get("/healthz")).startswith(b"HTTP/1.1 200 OK\r\n")


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\r\n\r\n", b"400"),
        (b"\r\n\r\n", b"400"),
        (b"GET /healthz\r\n\r\n", b"400"),
        (b"GET  HTTP/1.1\r\n\r\n", b"404"),
        (b"POST /metrics HTTP/1.1\r\nContent-Length: 9\r\n\r\n", b"405"),
        (b"GET /\xff\x00 HTTP/1.1\r\n\r\n", b"404"),
        (b"GET /readyz?x=1 HTTP/1.0\r\n\r\n", b"503"),
        (b"GET /" + b"a" * 2 * MAX_HEAD_BYTES + b" HTTP/1.1\r\n\r\n", b"431"),
        (b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * MAX_HEAD_BYTES + b"\r\n", b"431"),
    ],
    ids=["tls", "empty", "old", "no path", "post", "bytes", "query", "long line", "many headers"],
)
def test_what_is_no_request_gets_an_answer_and_an_end(server, sent, status):
    answer = exchange(server, sent)
    assert answer.partition(b" ")[2].startswith(status) or (status == b"431" and answer == b""), answer[:100]
    assert answer.count(b"HTTP/1.1 ") <= 1


def test_of_pipelined_requests_the_first_is_answered(server):
    assert exchange(server, get("/healthz") + get("/metrics")).count(b"HTTP/1.1 ") == 1


def test_head_has_no_body(server):
    answer = exchange(server, get("/metrics").replace(b"GET", b"HEAD"))
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n") and answer.endswith(b"\r\n\r\n")


def test_a_flood_of_scrapes_puts_metrics_together_once_in_a_while(server, monkeypatch):
    calls = []
    monkeypatch.setattr(http, "METRICS_AGE_S", HANGS_S)
    monkeypatch.setattr(http, "generate_latest", lambda registry: calls.append(registry) or b"x 1\n")
    monkeypatch.setattr(server, "_metrics_at", -HANGS_S)
    for _ in range(20):
        assert exchange(server, get("/metrics")).endswith(b"x 1\n")
    assert len(calls) == 1
