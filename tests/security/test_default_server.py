"""Who names no server finds this user's embedded one whenever it starts, or reads where it was looked for."""

import os
import socket

import pytest

from ingine import local_server
from ingine.errors import ConfigError
from ingine.keys import Keys
from ingine.local_server import other_person_on, running_url
from ingine.servers import Servers
from producer import AsyncClient, Client, ServerUnavailable
from tests.security.neighbours import NEIGHBOUR, needs_root
from worker import embedded, server_choice
from worker.embedded import EmbeddedServer


@pytest.fixture
def data_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("INGINE_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.delenv("INGINE_REDIS_URL", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("producer.connection.RETRIES", 0)
    return tmp_path / "data"


@pytest.fixture
def default_port(monkeypatch) -> int:
    """A free port that stands for 6379, which this machine may well have in use."""
    port = embedded._free_port()
    for module in ("ingine.local_server", "worker.server_choice"):
        monkeypatch.setattr(f"{module}.DEFAULT_PORT", port)
    monkeypatch.setattr(local_server, "DEFAULT_URL", f"redis://127.0.0.1:{port}/0")
    return port


# ---------------------------------------------------------------------------------------- whenever


def test_a_client_finds_a_server_that_started_after_it_was_used(data_dir, default_port):
    with Client() as client:
        with pytest.raises(ServerUnavailable, match=f"looked for in {data_dir}: none was started there"):
            client.submit("hi")
        with EmbeddedServer(data_dir, port=default_port):
            assert client.submit("hi", job_id="a").job_id == "a"
        with EmbeddedServer(data_dir):  # at another port
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


@needs_root
async def test_nothing_is_sent_to_another_person_who_takes_the_port_later(data_dir, default_port):
    async with AsyncClient() as client:
        with EmbeddedServer(data_dir, port=default_port):
            await client.submit("hi", job_id="a")
        os.seteuid(NEIGHBOUR)
        try:
            his = socket.create_server(("127.0.0.1", default_port))
        finally:
            os.seteuid(0)
        with his:
            with pytest.raises(ServerUnavailable, match=f"is another user's, {NEIGHBOUR}: set INGINE_REDIS"):
                await client.submit("hi")
            his.setblocking(False)
            with pytest.raises(BlockingIOError):
                his.accept()


# ------------------------------------------------------------------------------------------- where


def test_a_new_name_of_the_machine_hides_no_server(data_dir, monkeypatch):
    with EmbeddedServer(data_dir) as server:
        monkeypatch.setattr(socket, "gethostname", lambda: "another")
        assert running_url(data_dir) == server.url


async def test_what_hides_a_server_is_said(data_dir, default_port):
    """With it, a server that wants a password would be all that one hears of."""
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


def test_a_worker_says_where_it_looked(data_dir, default_port, tmp_path):
    with (
        EmbeddedServer(tmp_path / "another", port=default_port),
        pytest.raises(
            ConfigError, match=f"wants a password.*looked for in {data_dir}: none was started there"
        ),
    ):
        server_choice.ensure_server(None)


# ------------------------------------------------------------------------------------------- whose


@needs_root
@pytest.mark.parametrize(
    ("host", "is_reached"),
    [("127.0.0.1", True), ("0.0.0.0", True), ("::", True), ("127.0.0.2", False), ("::1", False)],
)
def test_another_person_on_another_address_is_not_in_the_way(host, is_reached):
    os.seteuid(NEIGHBOUR)
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        his = socket.create_server((host, 0), family=family, dualstack_ipv6=host == "::")
    finally:
        os.seteuid(0)
    with his:
        assert other_person_on(his.getsockname()[1]) == (str(NEIGHBOUR) if is_reached else None)
