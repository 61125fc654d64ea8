"""The embedded server belongs to its user alone, whose commands find it without a setting."""

import logging
import os
import socket
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import redis

from ingine.connect import local_server
from ingine.connect.local_server import DEFAULT_URL, DefaultServer, other_person_on, running_url
from ingine.errors import ConfigError
from ingine.producer.settings import load_settings
from ingine.worker import embedded, server_choice
from ingine.worker.embedded import EmbeddedServer
from tests.security.neighbours import NEIGHBOUR, become_the_neighbour, needs_root
from tests.waiting import HANGS_S


@pytest.fixture
def data_dir(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("INGINE_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.delenv("INGINE_REDIS_URL", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "data"


def modes(folder: Path) -> dict[str, str]:
    paths = [folder, *folder.rglob("*")]
    return {str(path.relative_to(folder)): oct(path.stat().st_mode & 0o777) for path in paths}


def open_to_all(folder: Path) -> list[str]:
    return [name for name, mode in modes(folder).items() if int(mode, 8) & 0o077]


def test_nobody_gets_in_without_the_password(data_dir):
    with EmbeddedServer(data_dir) as server:
        address = server.url.partition("@")[2]
        for url in (f"redis://{address}", f"redis://:wrong@{address}", f"redis://default:@{address}"):
            with redis.Redis.from_url(url) as client, pytest.raises(redis.AuthenticationError):
                client.ping()
        with redis.Redis.from_url(server.url) as client:
            assert client.ping()


def test_all_its_files_are_private_whatever_the_umask(data_dir):
    before = os.umask(0)
    try:
        with EmbeddedServer(data_dir) as server, redis.Redis.from_url(server.url) as client:
            client.set("prompt", "secret")
            client.bgrewriteaof()
            assert {"url", "password", "valkey.conf", "valkey.log"} <= modes(data_dir).keys()
            assert not open_to_all(data_dir)
    finally:
        os.umask(before)
    assert not open_to_all(data_dir)


def test_the_password_is_neither_in_the_list_of_processes_nor_in_the_log(data_dir, monkeypatch, caplog):
    monkeypatch.setattr(server_choice, "DEFAULT_PORT", embedded._free_port())
    with caplog.at_level(logging.DEBUG):
        url, server = server_choice.ensure_server(None)
        with server:
            assert server_choice.ensure_server(None) == (url, None)
            password = urlsplit(url).password
            arguments = [*server._child._popen.args, Path(f"/proc/{server.pid}/cmdline").read_text()]
    assert len(password) == 64 and not any(password in argument for argument in arguments)
    assert password not in caplog.text and password not in server.log_path.read_text()
    assert f"others need INGINE_REDIS_URL, set to the content of {server.url_path}" in caplog.text


def test_commands_of_the_same_user_find_it(data_dir):
    assert DefaultServer().find() == DEFAULT_URL
    with EmbeddedServer(data_dir) as server:
        assert DefaultServer().find() == server.url
        command = [sys.executable, "-m", "ingine", "submit", "hi", "--job-id", "mine"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=HANGS_S)
        assert (done.returncode, done.stdout) == (0, "mine\n"), done.stderr
    assert DefaultServer().find() == DEFAULT_URL, "nobody gets the password once it has ended"


def test_a_server_keeps_its_password(data_dir):
    """Clients that lost the server can then reconnect."""
    with EmbeddedServer(data_dir) as server:
        url = server.url
    with EmbeddedServer(data_dir, port=server.port) as again:
        assert again.url == url


def test_what_an_earlier_version_has_left_is_closed(data_dir):
    with EmbeddedServer(data_dir) as server, redis.Redis.from_url(server.url) as client:
        client.set("prompt", "secret")
    (data_dir / "password").unlink()
    for path in (data_dir, *data_dir.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    (data_dir / "password").write_text("a" * 64)  # which any user can read
    with EmbeddedServer(data_dir) as server, redis.Redis.from_url(server.url) as client:
        assert client.get("prompt") == b"secret"
        assert not open_to_all(data_dir)
        assert "a" * 64 not in server.url


@pytest.mark.parametrize("name", [".", "valkey.log", "appendonlydir"])
def test_what_another_user_has_put_there_is_not_used(data_dir, give_away, name):
    data_dir.mkdir()
    (data_dir / "appendonlydir").mkdir()
    (data_dir / "valkey.log").touch()
    give_away(data_dir / name)
    with pytest.raises(ConfigError, match=r"belongs to another user.*INGINE_DATA_DIR"):
        EmbeddedServer(data_dir).start()


@needs_root
def test_a_data_directory_that_root_has_made_needs_no_change(shared_folder):
    """Such a container runs under any user id in root's group, and only root could change the directory."""
    data_dir = shared_folder / "data"
    data_dir.mkdir()
    data_dir.chmod(0o770)
    os.seteuid(NEIGHBOUR)
    try:
        with EmbeddedServer(data_dir) as server, redis.Redis.from_url(server.url) as client:
            assert client.ping()
    finally:
        os.seteuid(0)
    assert modes(data_dir)["."] == oct(0o770)


def test_its_log_is_not_written_through_a_link(data_dir, tmp_path):
    data_dir.mkdir()
    (data_dir / "valkey.log").symlink_to(tmp_path / "profile")
    with pytest.raises(ConfigError, match="INGINE_DATA_DIR"):
        EmbeddedServer(data_dir).start()
    assert not (tmp_path / "profile").exists()


def test_a_url_of_another_user_is_not_believed(data_dir, give_away):
    with EmbeddedServer(data_dir) as server:
        give_away(server.url_path)
        assert running_url(data_dir) is None


def test_a_url_of_another_machine_is_not_used(data_dir, monkeypatch):
    """Several machines see a home on a file server, and its locks; several containers see a shared volume."""
    with EmbeddedServer(data_dir) as server:
        assert running_url(data_dir) == server.url
        monkeypatch.setattr(local_server, "this_host", lambda: '{"name": "another"}')
        assert running_url(data_dir) is None


@needs_root
def test_an_attack_by_another_user(shared_folder):
    """The folder is accessible to every user.

    The attacker reads nothing, and the server refuses the connection.
    """
    files = "url password valkey.conf valkey.log appendonlydir"
    read = f"for file in $(ls -A {{0}}; echo . {files}); do cat {{0}}/$file; done"
    with EmbeddedServer(shared_folder / "data") as server, redis.Redis.from_url(server.url) as client:
        client.set("prompt", "secret")
        tried = subprocess.run(
            ["sh", "-c", read.format(server.data_dir)],
            capture_output=True,
            text=True,
            preexec_fn=become_the_neighbour,
        )
        assert tried.stdout == "" and tried.stderr.count("Permission denied") == 7


@needs_root
def test_a_server_of_another_person_on_the_default_port_is_not_taken_for_ours(data_dir, monkeypatch, caplog):
    """The other person may have started it first, to read what is submitted."""
    os.seteuid(NEIGHBOUR)
    try:
        his = socket.create_server(("127.0.0.1", 0))
    finally:
        os.seteuid(0)
    for module in ("ingine.connect.local_server", "ingine.worker.server_choice"):
        monkeypatch.setattr(f"{module}.DEFAULT_PORT", his.getsockname()[1])
    with his:
        with pytest.raises(ConfigError, match=rf"is another user's, {NEIGHBOUR}: set INGINE_REDIS_URL"):
            DefaultServer().find()
        assert load_settings().redis_url is None, "a client of one's own needs no server of ours"
        url, server = server_choice.ensure_server(None)
        with server:
            assert "is taken by a server of another user" in caplog.text
            assert DefaultServer().find() == url == server.url


@needs_root
@pytest.mark.parametrize(
    ("user", "is_a_person"),
    [(0, False), (999, False), (1000, True), (59_999, True), (60_000, False), (65_534, False)],
)
def test_a_server_of_a_service_is_no_other_persons(user, is_a_person):
    """A server that a package has installed, or a container's, is for all users of the machine."""
    os.seteuid(user)
    try:
        server = socket.create_server(("127.0.0.1", 0))
    finally:
        os.seteuid(0)
    with server:
        assert (other_person_on(server.getsockname()[1]) is not None) == is_a_person
