"""The embedded server: a real one, durable, that never outlives the process which started it."""

import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import redis

from ingine.errors import ConfigError
from ingine.worker import embedded, server_choice
from ingine.worker.embedded import EmbeddedServer
from ingine.worker.server_choice import ensure_server
from tests.waiting import HANGS_S, wait_until


def answers(url: str) -> bool:
    try:
        with redis.Redis.from_url(url, retry=None) as client:
            return client.ping()
    except redis.ConnectionError:
        return False


@pytest.fixture
def default_port(monkeypatch) -> int:
    """Use a free port in place of 6379, which may be in use on this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setattr(server_choice, "DEFAULT_PORT", port)
    monkeypatch.setattr(server_choice, "DEFAULT_URL", f"redis://127.0.0.1:{port}/0")
    return port


def test_it_is_durable_and_never_evicts(redis_server):
    with redis.Redis.from_url(redis_server.url) as client:
        settings = client.config_get("append*", "maxmemory-policy", "save", "bind")
    assert settings["appendonly"] == "yes" and settings["appendfsync"] == "everysec"
    assert settings["maxmemory-policy"] == "noeviction"
    assert settings["bind"] == "127.0.0.1"


def test_what_was_written_is_there_after_a_restart(tmp_path):
    with EmbeddedServer(tmp_path) as server, redis.Redis.from_url(server.url) as client:
        client.set("greeting", "hello")
    assert not answers(server.url)
    with EmbeddedServer(tmp_path) as server, redis.Redis.from_url(server.url) as client:
        assert client.get("greeting") == b"hello"


PARENT = """
import sys, time
import redis
from pathlib import Path
from ingine.worker.embedded import EmbeddedServer

with EmbeddedServer(Path(sys.argv[1])) as server:
    client = redis.Redis.from_url(server.url)
    client.set("state", "running")
    try:
        print(server.url, flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        client.set("state", "drained")
"""


@pytest.fixture
def parent(tmp_path):
    """A process of its own group that has started a server in tmp_path, and that server's URL."""
    command = [sys.executable, "-c", PARENT, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    yield process, process.stdout.readline().strip()
    process.kill()
    process.wait()
    process.stdout.close()


def state_in(data_dir) -> bytes:
    with EmbeddedServer(data_dir) as server, redis.Redis.from_url(server.url) as client:
        return client.get("state")


def test_it_ends_when_its_parent_is_killed(parent, tmp_path):
    process, url = parent
    assert answers(url)
    process.kill()
    wait_until(lambda: not answers(url), what="the end of the server")
    assert state_in(tmp_path) == b"running"


def test_ctrl_c_ends_it_only_after_its_parent_has_drained(parent, tmp_path):
    process, url = parent
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    assert process.wait(HANGS_S) == 0
    assert not answers(url)
    assert state_in(tmp_path) == b"drained"


def test_a_taken_port_is_named(tmp_path, redis_server):
    with pytest.raises(ConfigError, match=f"port {redis_server.port} is taken"):
        EmbeddedServer(tmp_path, port=redis_server.port).start()


def test_a_data_directory_serves_one_server_at_a_time(tmp_path):
    with EmbeddedServer(tmp_path), pytest.raises(ConfigError, match=f"URL is in {tmp_path}"):
        EmbeddedServer(tmp_path).start()


def test_a_data_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="INGINE_DATA_DIR"):
        EmbeddedServer(tmp_path / "file" / "below").start()


def test_a_server_that_cannot_start_shows_its_log(tmp_path):
    (tmp_path / "appendonlydir").touch()
    with pytest.raises(ConfigError, match=r"did not start[\s\S]*appendonlydir"):
        EmbeddedServer(tmp_path).start()


def test_without_the_wheel_an_installed_server_serves(tmp_path, monkeypatch):
    installed = tmp_path / "bin" / "redis-server"
    installed.parent.mkdir()
    installed.symlink_to(embedded.find_binary())
    monkeypatch.setattr(embedded, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(installed.parent))
    with EmbeddedServer(tmp_path / "data") as server:
        assert answers(server.url) and embedded.find_binary() == installed


def test_without_any_server_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"ingine-llm\[embedded\].*redis-server.*INGINE_REDIS_URL"):
        EmbeddedServer(tmp_path).start()


def test_with_a_url_nothing_is_started(default_port):
    url = "redis://no-such-host.invalid:6379/0"
    assert ensure_server(url) == (url, None)


def test_without_a_url_one_is_started_on_the_default_port_and_then_shared(default_port, tmp_path):
    url, server = ensure_server(None, data_dir=tmp_path)
    with server:
        assert server.port == default_port
        assert ensure_server(None, data_dir=tmp_path) == (url, None)


def test_two_that_start_at_the_same_moment_share_one_server(default_port, tmp_path):
    with ThreadPoolExecutor() as pool:
        starts = [pool.submit(ensure_server, None, data_dir=tmp_path) for _ in range(2)]
        urls, servers = zip(*(start.result() for start in starts), strict=True)
    started = [server for server in servers if server]
    try:
        assert len(started) == 1 and len(set(urls)) == 1
    finally:
        for server in started:
            server.stop()


def test_a_worker_may_start_at_once_after_one_that_was_killed(default_port, parent, tmp_path):
    process, _ = parent
    process.kill()
    process.wait()  # its server has not noticed yet, and still has the data directory
    _, server = ensure_server(None, data_dir=tmp_path)
    with server, redis.Redis.from_url(server.url) as client:
        assert client.get("state") == b"running"


def test_a_stranger_on_the_default_port_is_left_alone(default_port, tmp_path):
    with socket.create_server(("127.0.0.1", default_port)):
        url, server = ensure_server(None, data_dir=tmp_path)
        with server:
            assert str(default_port) not in url and answers(url)


def test_a_server_with_a_password_is_not_passed_over(default_port, tmp_path):
    with (
        EmbeddedServer(tmp_path / "another", port=default_port),
        pytest.raises(ConfigError, match="wants a password"),
    ):
        ensure_server(None, data_dir=tmp_path)
