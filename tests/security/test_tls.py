"""`rediss://`: the connection is encrypted, and only made to a server whose certificate can be verified."""

import asyncio
import logging
from pathlib import Path
from urllib.parse import quote

import pytest
import trustme
from typer.testing import CliRunner

from ingine.cli.main import app
from ingine.producer import AsyncClient, ConfigError, ServerUnavailable
from ingine.worker.settings import load_settings
from tests.security.acl_server import password_of
from tests.security.tls import TlsFront
from tests.waiting import wait_until_async

GREEDY = {"temperature": 0, "max_tokens": 6, "ignore_eos": True}
SECRET_PROMPT = "a prompt that is nobody else's business"


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def front(authority, acl_server):
    with TlsFront(authority, acl_server.port) as front:
        yield front


def url_of(front: TlsFront, role: str, ca_file: Path | str | None, host: str = "127.0.0.1") -> str:
    options = f"?ssl_ca_certs={ca_file}" if ca_file else ""
    return f"rediss://ingine-{role}:{quote(password_of(role), safe='')}@{host}:{front.port}/0{options}"


@pytest.fixture
def ca_file(authority, tmp_path) -> Path:
    path = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(path))
    return path


@pytest.fixture
def wrong_ca_file(tmp_path) -> Path:
    path = tmp_path / "wrong.pem"
    trustme.CA().cert_pem.write_to_path(str(path))
    return path


def sent_in_clear(front: TlsFront) -> list[bytes]:
    secrets = [password_of("worker"), password_of("producer"), SECRET_PROMPT, "ingine", "AUTH"]
    return [secret for secret in map(str.encode, secrets) if secret in front.seen]


async def test_worker_producer_and_shell_speak_through_tls_and_nothing_is_readable(
    front, ca_file, queue, run_worker
):
    await run_worker(url_of(front, "worker", ca_file))
    url = url_of(front, "producer", ca_file)
    async with AsyncClient(url, queue=queue) as client:
        handle = await client.submit(SECRET_PROMPT, **GREEDY)
        assert [chunk async for chunk in handle.stream()][-1].position == 6
        assert (await client.queue_info()).workers
    arguments = ["status", handle.job_id, "--redis-url", url, "--queue", queue]
    done = await asyncio.to_thread(CliRunner().invoke, app, arguments)
    assert done.exit_code == 0 and "finished" in done.output
    assert len(front.seen) > 5000 and not sent_in_clear(front)


@pytest.mark.parametrize("ca", ["wrong_ca_file", None])
async def test_a_certificate_of_unknown_origin_is_an_error_at_once(front, ca, queue, request):
    url = url_of(front, "producer", ca and request.getfixturevalue(ca))
    async with AsyncClient(url, queue=queue) as client:
        with pytest.raises(ServerUnavailable, match="certificate verify failed"):
            await client.submit(SECRET_PROMPT)
    assert front.seen and not sent_in_clear(front)
    assert front.seen.count(b"\x16\x03\x01") == 1, "a single handshake: trying again would not help"


async def test_a_certificate_for_another_host_is_refused(authority, acl_server, ca_file, queue):
    with TlsFront(authority, acl_server.port, host="redis.internal") as front:
        async with AsyncClient(url_of(front, "producer", ca_file), queue=queue) as client:
            with pytest.raises(ServerUnavailable, match="certificate verify failed"):
                await client.submit(SECRET_PROMPT)
        assert not sent_in_clear(front)


async def test_a_worker_waits_and_says_that_it_is_the_certificate(
    front, wrong_ca_file, queue, run_worker, caplog
):
    caplog.set_level(logging.INFO)
    await run_worker(url_of(front, "worker", wrong_ca_file))

    def said() -> bool:
        errors = [str(getattr(record, "fields", {}).get("error")) for record in caplog.records]
        return any("certificate verify failed" in error for error in errors)

    await wait_until_async(said, what="the worker's complaint")
    assert not sent_in_clear(front)


def test_a_missing_file_is_a_wrong_setting(tmp_path, monkeypatch):
    url = f"rediss://:secret@localhost/0?ssl_ca_certs={tmp_path / 'none.pem'}"
    monkeypatch.setenv("INGINE_REDIS_URL", url)
    for load in (AsyncClient, load_settings):
        with pytest.raises(ConfigError, match=r"INGINE_REDIS_URL.*cannot be used") as caught:
            load()
        assert "secret" not in str(caught.value)


async def test_a_client_without_tls_gets_nothing_from_a_server_that_wants_it(front, acl_server, queue):
    url = url_of(front, "producer", None).replace("rediss://", "redis://")
    async with AsyncClient(url, queue=queue) as client:
        with pytest.raises(ServerUnavailable, match="cannot be reached"):
            await client.submit(SECRET_PROMPT)
