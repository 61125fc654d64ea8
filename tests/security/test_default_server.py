"""Without a URL, clients find this user's embedded server whenever it starts, or say where they looked."""

import asyncio
import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ingine.connect import local_server
from ingine.connect.local_server import other_person_on, running_url
from ingine.connect.servers import Servers
from ingine.contract.keys import Keys
from ingine.errors import ConfigError
from ingine.producer import AsyncClient, Client, ServerUnavailable
from ingine.worker import embedded, server_choice
from ingine.worker.embedded import EmbeddedServer
from tests.security.neighbours import NEIGHBOUR, needs_root
from tests.servers import durable_server
from tests.waiting import HANGS_S


@pytest.fixture
def data_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("INGINE_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.delenv("INGINE_REDIS_URL", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ingine.producer.connection.RETRIES", 0)
    return tmp_path / "data"


@pytest.fixture
def default_port(monkeypatch) -> int:
    """Use a free port in place of 6379, which may be in use on this machine."""
    port = embedded._free_port()
    for module in ("ingine.connect.local_server", "ingine.worker.server_choice"):
        monkeypatch.setattr(f"{module}.DEFAULT_PORT", port)
    monkeypatch.setattr(local_server, "DEFAULT_URL", f"redis://127.0.0.1:{port}/0")
    return port


@contextmanager
def as_the_neighbour() -> Iterator[None]:
    os.seteuid(NEIGHBOUR)
    try:
        yield
    finally:
        os.seteuid(0)


# ---------------------------------------------------------------------------------------- whenever


def test_a_client_finds_a_server_that_started_after_it_was_used(data_dir, default_port):
    with Client() as client:
        with pytest.raises(ServerUnavailable, match=f"looked for in {data_dir}: none was started there"):
            client.submit("hi")
        with EmbeddedServer(data_dir, port=default_port):
            assert client.submit("hi", job_id="a").job_id == "a"
        with EmbeddedServer(data_dir):  # on another port
            assert client.status("a").position == 0


async def test_so_does_an_asyncio_client(data_dir, default_port):
    async with AsyncClient() as client:
        with pytest.raises(ServerUnavailable):
            await client.submit("hi")
        with EmbeddedServer(data_dir, port=default_port):
            assert (await client.submit("hi", job_id="a")).job_id == "a"


async def test_so_does_a_worker_that_uses_the_server_of_another(data_dir, default_port):
    servers = Servers(None, client_name="test", retries=1)
    with EmbeddedServer(data_dir, port=default_port) as server:
        assert await servers.client(Keys()).ping()
    server.data_dir.joinpath("password").unlink()
    with EmbeddedServer(data_dir) as again:
        assert again.url != server.url
        assert await servers.client(Keys()).ping()
        assert servers.where == f"127.0.0.1:{again.port}"
    await servers.aclose()


async def test_who_has_used_it_uses_no_other_while_it_is_away(data_dir, default_port, tmp_path):
    """While a worker restarts, its port is free for a moment, and any process may take it."""
    async with AsyncClient() as client:
        with EmbeddedServer(data_dir):
            await client.submit("hi", job_id="a")
        with durable_server(tmp_path / "other", port=default_port):
            with pytest.raises(ServerUnavailable, match="is away"):
                await client.submit("hi", job_id="b")
            async with AsyncClient() as new:
                await new.submit("hi", job_id="b")
        with EmbeddedServer(data_dir):
            assert (await client.status("a")).position == 0


@needs_root
async def test_nothing_is_sent_to_another_person_who_takes_the_port_later(data_dir, default_port):
    async with AsyncClient() as client:
        with EmbeddedServer(data_dir, port=default_port):
            await client.submit("hi", job_id="a")
        with as_the_neighbour():
            his = socket.create_server(("127.0.0.1", default_port))
        with his:
            says = f"looked for in {data_dir}: it has ended, with its worker"
            with pytest.raises(ServerUnavailable, match=says):
                await client.submit("hi")
            his.setblocking(False)
            with pytest.raises(BlockingIOError):
                his.accept()


# ------------------------------------------------------------------------------------------- where


def test_a_new_name_of_the_machine_hides_no_server(data_dir, monkeypatch):
    with EmbeddedServer(data_dir) as server:
        monkeypatch.setattr(socket, "gethostname", lambda: "another")
        assert running_url(data_dir) == server.url


@pytest.fixture
def masked(monkeypatch) -> set[str]:
    """Hide files of /proc from this process, as sandboxes do."""
    hidden, read_text, readlink = set(), Path.read_text, os.readlink

    def unless_hidden(call):
        def check(path, *args, **kwargs):
            if str(path) in hidden:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return call(path, *args, **kwargs)

        return check

    monkeypatch.setattr(Path, "read_text", unless_hidden(read_text))
    monkeypatch.setattr(os, "readlink", unless_hidden(readlink))
    return hidden


BOOT_ID, NAMESPACE = "/proc/sys/kernel/random/boot_id", "/proc/self/ns/net"


@pytest.mark.parametrize("hidden", [[BOOT_ID], [NAMESPACE], [BOOT_ID, NAMESPACE]], ids=str)
@pytest.mark.parametrize("who", ["the server", "the client"])
def test_what_a_sandbox_hides_of_the_machine_hides_no_server(data_dir, monkeypatch, masked, hidden, who):
    """One of two processes may run in a sandbox, and what both can read is the same."""
    masked.update(hidden if who == "the server" else ())
    with EmbeddedServer(data_dir) as server:
        masked.symmetric_difference_update(hidden)
        assert running_url(data_dir) == server.url
        # Namespaces of two machines have the same number, and containers of one machine its boot id.
        monkeypatch.setattr(socket, "gethostname", lambda: "another")
        assert running_url(data_dir) is None


async def test_what_hides_a_server_is_said(data_dir, default_port):
    """Otherwise the error would only be about a server that requires a password."""
    with EmbeddedServer(data_dir, port=default_port) as server:
        host = data_dir / "host"
        this, _ = host.read_text(), host.write_text("another")
        assert running_url(data_dir) is None
        async with AsyncClient() as client:
            with pytest.raises(ServerUnavailable, match=rf"looked for in {data_dir}: .* another machine"):
                await client.submit("hi")
            host.write_text(this)
            assert await client.submit("hi")
            server.url_path.chmod(0o644)
        async with AsyncClient() as client:
            with pytest.raises(ServerUnavailable, match=f"{server.url_path} is not this user's alone"):
                await client.submit("hi")


@pytest.fixture
def unusable(tmp_path, monkeypatch) -> str:
    """A data folder that not even root can inspect, and the error for it."""
    data_dir = tmp_path / ("x" * 300)
    monkeypatch.setenv("INGINE_DATA_DIR", str(data_dir))
    return f"looked for in {data_dir}: it cannot be looked at, File name too long"


async def test_a_folder_that_cannot_be_looked_at_is_said(
    data_dir, default_port, unusable, tmp_path, monkeypatch
):
    """A client that waits for a job when the server dies gets the error, too."""
    monkeypatch.setattr("ingine.producer.token_log.GIVE_UP_S", 0.2)
    async with AsyncClient() as client, asyncio.timeout(HANGS_S):
        with durable_server(tmp_path / "open", port=default_port):
            job = await client.submit("hi")
        with pytest.raises(ServerUnavailable, match=unusable):
            await job.result()
        with pytest.raises(ServerUnavailable, match=unusable):
            await client.submit("hi")


def test_a_worker_says_so_too(data_dir, default_port, unusable, tmp_path):
    with (
        EmbeddedServer(tmp_path / "another", port=default_port),
        pytest.raises(ConfigError, match=unusable),
    ):
        server_choice.ensure_server(None)


@needs_root
def test_a_folder_of_another_user_is_said(data_dir):
    servers = Servers(None, client_name="test")
    data_dir.mkdir(mode=0o700)
    with as_the_neighbour():
        assert running_url(data_dir) is None
        assert f"looked for in {data_dir}: it cannot be looked at, Permission denied" in servers.looked_in


def test_a_worker_says_where_it_looked(data_dir, default_port, tmp_path):
    with (
        EmbeddedServer(tmp_path / "another", port=default_port),
        pytest.raises(
            ConfigError, match=f"wants a password.*looked for in {data_dir}: none was started there"
        ),
    ):
        server_choice.ensure_server(None)


# ------------------------------------------------------------------------------------------- whose


@pytest.mark.parametrize(
    ("number", "says"), [(errno.EMFILE, "Too many open files"), (errno.ENOENT, None), (errno.EACCES, None)]
)
def test_whose_it_is_is_not_guessed_for_want_of_a_file(default_port, monkeypatch, number, says):
    """A kernel without that table does not say.

    If no descriptor is free to read the table, the answer is an error.
    """

    def refuse(path: Path) -> str:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "read_text", refuse)
    if says:
        with pytest.raises(ConfigError, match=f"{says}.*set INGINE_REDIS_URL"):
            other_person_on(default_port)
    else:
        assert other_person_on(default_port) is None


@needs_root
@pytest.mark.parametrize(
    ("host", "is_reached"),
    [("127.0.0.1", True), ("0.0.0.0", True), ("::", True), ("127.0.0.2", False), ("::1", False)],
)
def test_another_person_on_another_address_is_not_in_the_way(host, is_reached):
    with as_the_neighbour():
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        his = socket.create_server((host, 0), family=family, dualstack_ipv6=host == "::")
    with his:
        assert other_person_on(his.getsockname()[1]) == (str(NEIGHBOUR) if is_reached else None)
