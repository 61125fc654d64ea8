"""Settings: variables, `.env`, flags, and what a wrong one says."""

import pytest

from ingine.errors import ConfigError
from worker.settings import load_settings


def test_flags_win_over_variables_and_variables_over_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text("INGINE_QUEUE=from-file\nINGINE_LEASE_S=7\nINGINE_MAX_NUM_SEQS=3\n")
    monkeypatch.setenv("INGINE_LEASE_S", "8")
    monkeypatch.setenv("INGINE_MAX_NUM_SEQS", "4")
    settings = load_settings(["--max-num-seqs", "5", "--log-json"])
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
        load_settings([])
    message = str(caught.value)
    assert message.startswith(variable) and says in message and value in message


def test_a_wrong_url_is_named_without_its_password():
    with pytest.raises(ConfigError, match=r"INGINE_REDIS_URL.*redis://, rediss://, unix://") as caught:
        load_settings(["--redis-url", "http://:secret@host"])
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
        load_settings(["--redis-url", url])


def test_all_faults_are_named_at_once(monkeypatch):
    monkeypatch.setenv("INGINE_DTYPE", "int3")
    monkeypatch.setenv("INGINE_BLOCK_SIZE", "-1")
    with pytest.raises(ConfigError) as caught:
        load_settings([])
    assert {line.split()[0] for line in str(caught.value).splitlines()} == {
        "INGINE_DTYPE",
        "INGINE_BLOCK_SIZE",
    }


def test_an_unknown_flag_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as caught:
        load_settings(["--lease", "3"])
    assert caught.value.code == 2
    assert "--lease" in capsys.readouterr().err


def test_worker_ids_are_new_at_each_start():
    assert load_settings([]).worker_id != load_settings([]).worker_id
