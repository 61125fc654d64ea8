"""Settings: variables, `.env`, flags, and what a wrong one says."""

from typing import get_args

import pytest

from ingine.errors import ConfigError
from ingine.worker.identity import new_worker_id
from ingine.worker.settings import Bytes, WorkerSettings, load_settings


def test_flags_win_over_variables_and_variables_over_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text("INGINE_QUEUE=from-file\nINGINE_LEASE_S=7\nINGINE_MAX_NUM_SEQS=3\n")
    monkeypatch.setenv("INGINE_LEASE_S", "8")
    monkeypatch.setenv("INGINE_MAX_NUM_SEQS", "4")
    settings = load_settings(max_num_seqs="5", log_json=True)
    assert (settings.queue, settings.lease_s, settings.max_num_seqs) == ("from-file", 8, 5)
    assert settings.log_json is True


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("INGINE_DTYPE", "int3", "'float32', 'bfloat16' or 'float16'"),
        ("INGINE_MAX_NUM_SEQS", "0", "greater than or equal to 1"),
        ("INGINE_LEASE_S", "soon", "valid number"),
        ("INGINE_HTTP_PORT", "70000", "65535"),
        ("INGINE_QUEUE", "a b", "pattern"),
        ("INGINE_LOG_LEVEL", "loud", "'debug', 'info', 'warning' or 'error'"),
    ],
)
def test_a_wrong_value_names_the_variable_and_what_it_may_be(monkeypatch, variable, value, says):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError) as caught:
        load_settings()
    message = str(caught.value)
    assert message.startswith(variable) and says in message


def test_a_wrong_url_is_named_without_its_password():
    with pytest.raises(ConfigError, match=r"INGINE_REDIS_URL.*redis://, rediss://, unix://") as caught:
        load_settings(redis_url="http://:secret@host")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("redis://host:abc/0", "INGINE_REDIS_URL"),
        ("redis://host/0?protocol=3", "must not set protocol"),
        ("redis://host/0?decode_responses=True", "must not set decode_responses"),
    ],
)
def test_a_url_that_would_break_later_is_refused_now(url, says):
    with pytest.raises(ConfigError, match=says):
        load_settings(redis_url=url)


def test_all_faults_are_named_at_once(monkeypatch):
    monkeypatch.setenv("INGINE_DTYPE", "int3")
    monkeypatch.setenv("INGINE_BLOCK_SIZE", "-1")
    with pytest.raises(ConfigError) as caught:
        load_settings()
    assert {line.split()[0] for line in str(caught.value).splitlines()} == {
        "INGINE_DTYPE",
        "INGINE_BLOCK_SIZE",
    }


@pytest.mark.parametrize(
    ("given", "expected"),
    [("2000", 2000), ("2kB", 2000), ("2k", 2000), ("2GB", 2 * 10**9), ("2GiB", 2 << 30), ("1.5 Gi", 3 << 29)],
)
@pytest.mark.parametrize("name", ["kv_cache_bytes", "max_bytes", "max_job_bytes"])
def test_sizes_may_have_a_unit(monkeypatch, name, given, expected):
    assert getattr(load_settings(**{name: given}), name) == expected
    monkeypatch.setenv(f"INGINE_{name.upper()}", given)
    assert getattr(load_settings(), name) == expected


def test_every_setting_in_bytes_takes_a_unit():
    for name, field in WorkerSettings.model_fields.items():
        if name.endswith("bytes"):
            assert Bytes in get_args(field.annotation), name


@pytest.mark.parametrize("size", ["2XB", "GB", "-1GB", "1e9", "2 G B", "٢GB", ""])
def test_a_size_that_is_none_says_what_it_may_be(size):
    with pytest.raises(ConfigError, match=r"INGINE_KV_CACHE_BYTES.*must be a number of bytes.*2GB.*2GiB"):
        load_settings(kv_cache_bytes=size)


def test_a_service_called_ingine_http_does_not_stop_a_worker(monkeypatch):
    monkeypatch.setenv("INGINE_HTTP_PORT", "tcp://10.0.0.7:9464")
    assert load_settings().http_port == 9464


def test_worker_ids_are_new_at_each_start():
    name = load_settings().worker_id
    assert new_worker_id(name) != new_worker_id(name)


def test_a_worker_is_not_named_like_a_parking_place(monkeypatch):
    monkeypatch.setenv("INGINE_WORKER_ID", "parked:tiny")
    with pytest.raises(ConfigError, match="must not begin with 'parked:'"):
        load_settings()
