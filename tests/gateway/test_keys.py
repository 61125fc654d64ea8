"""API keys: made by a command, stored as digests, and asked for by the gateway."""

import json
import stat
import threading

import pytest
from typer.testing import CliRunner

from ingine.cli.main import app
from ingine.errors import ConfigError
from ingine.gateway.access import Caller
from ingine.gateway.keys import ApiKey, KeyFile, create_key, read_keys, revoke_key
from tests.gateway.serving import serving
from tests.gateway.test_errors import assert_error


@pytest.fixture
def path(tmp_path):
    return tmp_path / "keys.json"


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["keys", *arguments])
    assert result.exit_code == 0, result
    return result.stdout


def test_create_list_revoke(path):
    key = run("create", "--tenant", "acme", "--models", "a, b", "--keys", str(path)).strip()
    (entry,) = read_keys(path)
    assert (entry.tenant, entry.models) == ("acme", {"a", "b"})
    assert entry.id in run("list", "--keys", str(path))
    listed = json.loads(run("list", "--json", "--keys", str(path)))
    assert listed == {
        "id": entry.id, "tenant": "acme", "models": ["a", "b"], "created_at": entry.created_at
    }  # fmt: skip
    assert KeyFile(path).find(key) == entry
    run("revoke", entry.id, "--keys", str(path))
    assert KeyFile(path).find(key) is None and run("list", "--keys", str(path)) == ""


def test_the_file_can_come_from_the_setting(path, monkeypatch):
    monkeypatch.setenv("INGINE_GATEWAY_KEYS", str(path))
    key = json.loads(run("create", "--json"))
    assert key["tenant"] is None and key["models"] is None
    assert KeyFile(path).find(key["key"]).id == key["id"]


def test_without_a_file_a_command_says_so(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["keys", "list"])
    assert result.exit_code == 2 and "INGINE_GATEWAY_KEYS" in result.output


def test_the_file_does_not_hold_the_key_and_is_private(path):
    _, key = create_key(path, tenant=None, models=None)
    assert key not in path.read_text() and key.removeprefix("sk-ingine-") not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(key) >= 43 and key != create_key(path, tenant=None, models=None)[1]


def test_keys_made_at_the_same_time_are_all_kept(path):
    threads = [
        threading.Thread(target=create_key, args=(path,), kwargs={"tenant": f"t{n}", "models": None})
        for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {key.tenant for key in read_keys(path)} == {f"t{n}" for n in range(8)}


@pytest.mark.parametrize(
    "text", ["", "[]x", '{"id": "a"}', '[{"id": "a"}]', '[{"id": "a", "sha256": "short"}]']
)
def test_a_damaged_file_is_refused_at_the_start(path, text):
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"INGINE_GATEWAY_KEYS.*{path.name}"):
        KeyFile(path)


def test_a_file_that_is_damaged_later_locks_nobody_out(path):
    entry, key = create_key(path, tenant=None, models=None)
    keys = KeyFile(path)
    path.write_text("damaged")
    assert keys.find(key) == entry
    path.unlink()
    assert keys.find(key) == entry


def test_a_missing_file_an_unknown_key_and_a_bad_tenant_are_named(path):
    with pytest.raises(ConfigError, match="cannot be read"):
        KeyFile(path)
    with pytest.raises(ConfigError, match="tenant's name"):
        create_key(path, tenant="a b", models=None)
    create_key(path, tenant=None, models=None)
    with pytest.raises(ConfigError, match="has no key 'key_none'"):
        revoke_key(path, "key_none")


def test_who_sees_whose_jobs():
    one, other = (ApiKey(id=name, sha256="0" * 64, tenant="acme") for name in ("one", "other"))
    alone = ApiKey(id="alone", sha256="0" * 64)
    assert Caller(one).owner == Caller(other).owner
    assert len({Caller(one).owner, Caller(alone).owner, Caller().owner}) == 3


async def test_a_gateway_with_keys_refuses_requests_without_one(settings, path):
    entry, key = create_key(path, tenant=None, models=None)
    async with serving(settings.model_copy(update={"gateway_keys": path})) as http:
        for headers in (
            {},
            {"authorization": key},
            {"authorization": f"Basic {key}"},
            {"authorization": "Bearer"},
            {"authorization": f"Bearer {key}x"},
            {"authorization": "Bearer \u00e9".encode()},
        ):
            response = await http.get("/v1/models", headers=headers)
            assert_error(response, 401, "invalid_api_key")
            assert response.headers["www-authenticate"] == "Bearer"
        assert (await http.get("/health")).status_code == 200
        headers = {"authorization": f"Bearer {key}", "host": "any.example"}
        assert (await http.get("/v1/models", headers=headers)).status_code == 200
        revoke_key(path, entry.id)
        assert_error(await http.get("/v1/models", headers=headers), 401, "invalid_api_key")
