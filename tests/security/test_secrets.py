"""The sources of a password, and that it is sent nowhere but to the server."""

import asyncio
import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from urllib.parse import quote

import pytest
from redis.exceptions import RedisError

from ingine.connect.servers import Servers
from ingine.contract.keys import Keys
from ingine.errors import ConfigError
from ingine.producer import AsyncClient, Client, ServerUnavailable
from ingine.producer.settings import load_settings as load_producer_settings
from ingine.worker.settings import WorkerSettings, load_settings
from tests.security.acl_server import password_of
from tests.servers import Valkey
from tests.waiting import HANGS_S, wait_until

LOADERS = {"worker": load_settings, "producer": load_producer_settings}
PASSWORD = "S3cr:e@t/?#%41"
ENCODED = quote(PASSWORD, safe="")
WRONG_URLS = [
    f"redis://ingine-worker:{ENCODED}@127.0.0.1:{{port}}/0",
    f"redis://:{ENCODED}@127.0.0.1:{{port}}/0",
    f"redis://127.0.0.1:{{port}}/0?username=ingine-worker&password={ENCODED}",
    f"redis+cluster://ingine-worker:{ENCODED}@127.0.0.1:{{port}}",
]


def leaks(text: object, password: str = PASSWORD) -> bool:
    return any(secret in str(text) for secret in (password, quote(password, safe=""), "S3cr"))


# ---------------------------------------------------------------------------------------- where from


@pytest.fixture
def sources(monkeypatch, tmp_path) -> Path:
    """A working directory without a `.env`, and an empty folder of secrets."""
    monkeypatch.chdir(tmp_path)
    for name in ("INGINE_REDIS_URL", "INGINE_QUEUE"):
        monkeypatch.delenv(name, raising=False)
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    monkeypatch.setenv("INGINE_SECRETS_DIR", str(secrets))
    return secrets


@pytest.mark.parametrize("who", LOADERS)
def test_variables_win_over_the_file_of_settings_and_that_over_secret_files(who, sources, monkeypatch):
    load = LOADERS[who]
    (sources / "ingine_redis_url").write_text("redis://from-secret-file/0\n")
    assert load().redis_url == "redis://from-secret-file/0"
    Path(".env").write_text("INGINE_REDIS_URL=redis://from-dotenv/0\n")
    assert load().redis_url == "redis://from-dotenv/0"
    monkeypatch.setenv("INGINE_REDIS_URL", "redis://from-variable/0")
    assert load().redis_url == "redis://from-variable/0"


def test_a_flag_or_argument_wins_over_all(sources):
    (sources / "ingine_redis_url").write_text("redis://from-secret-file/0")
    assert load_settings(redis_url="redis://flag/0").redis_url == "redis://flag/0"
    assert load_producer_settings(redis_url="redis://argument/0").redis_url == "redis://argument/0"


def test_a_secret_as_kubernetes_mounts_it_is_read(sources):
    """The name is a link to a link, which is replaced when the secret changes."""
    (sources / "..2026").mkdir()
    (sources / "..2026" / "ingine_redis_url").write_text("redis://mounted/0")
    (sources / "..data").symlink_to("..2026")
    (sources / "ingine_redis_url").symlink_to("..data/ingine_redis_url")
    assert load_settings().redis_url == "redis://mounted/0"


@pytest.mark.parametrize("who", LOADERS)
@pytest.mark.parametrize("folder", ["missing", "a-file"])
def test_a_folder_that_is_none_is_a_wrong_setting(who, folder, sources, monkeypatch):
    Path("a-file").write_text("x")
    monkeypatch.setenv("INGINE_SECRETS_DIR", folder)
    with pytest.raises(ConfigError, match=f"INGINE_SECRETS_DIR: {folder} must be a folder"):
        LOADERS[who]()


@pytest.mark.parametrize("who", LOADERS)
def test_a_file_that_may_not_be_read_is_a_wrong_setting(who, sources, monkeypatch):
    (sources / "ingine_redis_url").write_text("redis://h/0")

    def refuse(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(ConfigError, match=r"Permission denied.*ingine_redis_url"):
        LOADERS[who]()


# ----------------------------------------------------------------------------------------- where to


@pytest.mark.parametrize("scheme", ["redis", "redis+cluster", "redis+sentinel"])
async def test_a_server_that_does_not_know_auth_is_not_quoted(tmp_path, queue, scheme):
    """The server quotes the arguments of the command, as some proxies do too."""
    path = f"/primary/0?sentinel_password={ENCODED}" if "sentinel" in scheme else ""
    with Valkey(tmp_path, config='rename-command AUTH ""') as server:
        url = f"{scheme}://ingine-worker:{ENCODED}@{server.address}{path}"
        async with AsyncClient(url, queue=queue) as client:
            with pytest.raises(ServerUnavailable, match=r"unknown command 'AUTH'") as refused:
                await client.submit("hi")
    assert not leaks(refused.value) and not leaks(refused.value.__cause__)


def test_nothing_that_is_printed_by_accident_shows_it(monkeypatch):
    url = f"redis://me:{ENCODED}@localhost:1/0?password={ENCODED}"
    monkeypatch.setenv("INGINE_REDIS_URL", url)
    settings = load_settings()
    servers = Servers(url, client_name="test")
    with Client() as client:
        shown = [settings, load_producer_settings(), client, client.attach("a"), AsyncClient(), servers]
        redis = servers.client(Keys())
        shown += [servers.where, redis, redis.connection_pool]
        assert settings.redis_url == url
        assert [thing for thing in map(repr, shown) if leaks(thing)] == []


def test_no_help_shows_it():
    env = os.environ | {"INGINE_REDIS_URL": f"redis://me:{ENCODED}@localhost/0"}
    for command in (["worker"], ["submit"], ["queue", "show"], ["batch"]):
        arguments = [sys.executable, "-m", "ingine.cli.main", *command, "--help"]
        done = subprocess.run(arguments, env=env, capture_output=True, text=True, check=True)
        assert "redis-url" in done.stdout and not leaks(done.stdout + done.stderr)


@pytest.mark.parametrize(
    "url",
    [
        f"http://me:{ENCODED}@host",
        f"redis://me:{ENCODED}@host:port/0",
        f"redis://me:{ENCODED}@host/0?decode_responses=1",
        f"redis://me:{ENCODED}@host/0?no_such_option={ENCODED}",
        f"redis://me@host/0?password=x&{PASSWORD[:4]}=y",  # an & that should have been %26
        f"redis://me:{ENCODED}@host/0?socket_timeout={ENCODED}",
        f"rediss://me:{ENCODED}@host/0?ssl_ca_certs=/none",
        f"redis://me:{PASSWORD}@host/0",
        f"redis+cluster://me:{ENCODED}@host/1",
        f"redis+sentinel://me:{ENCODED}@host",
    ],
)
def test_no_refusal_of_a_url_shows_it(url, monkeypatch):
    monkeypatch.setenv("INGINE_REDIS_URL", url)
    for load in LOADERS.values():
        with pytest.raises(ConfigError) as caught:
            load()
        assert "INGINE_REDIS_URL" in str(caught.value) and not leaks(caught.value)
        assert caught.value.__cause__ is None and caught.value.__suppress_context__


@pytest.mark.parametrize("who", LOADERS)
@pytest.mark.parametrize("value", [f"redis://me:{ENCODED}@host/0", PASSWORD])
def test_no_setting_shows_it_that_gets_it_by_mistake(who, value, sources, monkeypatch):
    refused = set()
    for name in [*WorkerSettings.model_fields, "redis_password", "redis_urls"]:
        with monkeypatch.context() as patched:
            patched.setenv(f"INGINE_{name.upper()}", value)
            try:
                LOADERS[who]()
            except ConfigError as error:
                refused.add(name)
                assert f"INGINE_{name.upper()}" in str(error) and not leaks(error)
    assert refused >= {"queue", "redis_urls"}
    assert who == "producer" or refused >= {"max_num_seqs", "lease_s", "log_json", "dtype", "kv_cache_bytes"}


@pytest.mark.parametrize("who", LOADERS)
def test_no_line_shows_it_that_is_not_as_it_should_be(who, sources):
    """A colon in place of = makes the whole line a name."""
    Path(".env").write_text(f"INGINE_REDIS_URL:redis://me:{ENCODED}@host/0\n")
    with pytest.raises(ConfigError, match=r"\.env: .*INGINE_REDIS_URL") as caught:
        LOADERS[who]()
    assert not leaks(str(caught.value).lower(), PASSWORD.lower()) and "s3cr" not in str(caught.value).lower()


@pytest.mark.parametrize("url", WRONG_URLS)
async def test_a_wrong_password_is_an_error_at_once_that_does_not_show_it(acl_server, url, monkeypatch):
    pauses = []
    monkeypatch.setattr(
        "redis.asyncio.retry.sleep", lambda seconds: pauses.append(seconds) or asyncio.sleep(0)
    )
    async with AsyncClient(url.format(port=acl_server.port)) as client:
        with pytest.raises(ServerUnavailable, match="refuses these credentials") as caught:
            await client.submit("x")
    assert not pauses, "it would be as wrong the next time"
    error = caught.value
    while error:
        assert not leaks(error)
        error = error.__cause__ or error.__context__


@pytest.mark.parametrize("url", WRONG_URLS)
async def test_a_worker_with_a_wrong_password_ends_and_says_so(acl_server, url, run_worker):
    running = await run_worker(url.format(port=acl_server.port))
    with pytest.raises(
        ConfigError, match=r"the server at .* says: .*(invalid username-password|AUTH)"
    ) as caught:
        await running
    assert not leaks(caught.value)


@pytest.mark.parametrize("options", [("--log-json",), ("--log-prompts",)])
def test_a_worker_at_work_shows_it_nowhere(acl_server, queue, tiny_model, tmp_path, options):
    log = tmp_path / "worker.log"
    env = os.environ | {
        "INGINE_REDIS_URL": acl_server.url("worker"),
        "INGINE_QUEUE": queue,
        "INGINE_MODEL": str(tiny_model),
        "INGINE_LOG_LEVEL": "debug",
        "INGINE_HTTP_PORT": "0",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "ingine.cli.main", "worker", *options]
    with log.open("wb") as output, subprocess.Popen(command, env=env, stdout=output, stderr=output) as child:
        try:
            keys = Keys(queue)
            wait_until(lambda: b"ready" in log.read_bytes(), what="a worker that is ready")
            with Client(acl_server.url("producer"), queue=queue) as client:
                client.submit("x", max_tokens=3).result()
                broken = client.submit("y", max_tokens=300)
                next(iter(broken.stream()))
            # Every connection breaks once, so that retries are logged.
            acl_server.admin.execute_command("CLIENT", "KILL", "USER", "ingine-worker", "SKIPME", "yes")
            wait_until(lambda: b"retrying" in log.read_bytes(), what="a line about the broken connections")
            heartbeats = acl_server.admin.hgetall(keys.workers)
            shown = [log.read_text(), heartbeats, metrics(log.read_text())]
            assert heartbeats and "# HELP" in shown[2]
        finally:
            child.send_signal(signal.SIGTERM)
            child.wait(HANGS_S)
    shown.append(log.read_text())
    assert not [text for text in shown if leaks(text, password_of("worker"))]


def metrics(log: str) -> str:
    port = re.search(r"http\W+127\.0\.0\.1:(\d+)", log)[1]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=HANGS_S) as response:
        return response.read().decode()


def test_metrics_and_health_are_for_this_machine_only_by_default():
    assert WorkerSettings.model_fields["http_host"].default == "127.0.0.1"


async def test_a_command_that_is_refused_names_no_key(acl_server, queue):
    """NOPERM is sent to the caller, and names the right, not the contents."""
    async with AsyncClient(acl_server.url("observer"), queue=queue) as client:
        with pytest.raises(ServerUnavailable, match="no permissions") as caught:
            await client.submit("a prompt that nobody is to see")
    assert "a prompt" not in str(caught.value) and isinstance(caught.value.__cause__, RedisError)
