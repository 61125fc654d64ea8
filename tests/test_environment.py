"""Variables that nothing reads: a misspelled one is an error, a foreign one is ignored."""

import re

import pytest

from ingine.connect.environment import KNOWN_SETTINGS, check_variables
from ingine.errors import ConfigError
from ingine.gateway.settings import GatewaySettings
from ingine.producer.settings import load_settings as load_producer_settings
from ingine.worker.settings import WorkerSettings, load_settings
from tests.docs.tables import ROOT


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_list_has_all_settings_and_every_variable_that_is_read():
    code = "".join(
        path.read_text()
        for package in ("ingine", "gateway", "worker", "producer")
        for path in (ROOT / package).rglob("*.py")
    )
    read = {
        name.lower()
        for name in re.findall(r'(?:environ\.get\(|environ\[|user_folder\()"INGINE_([A-Z_]+)"', code)
    }
    assert WorkerSettings.model_fields.keys() | GatewaySettings.model_fields.keys() | read == KNOWN_SETTINGS


@pytest.mark.parametrize("load", [load_settings, load_producer_settings], ids=["worker", "producer"])
@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("INGINE_REDIS_URI", "INGINE_REDIS_URL"),
        ("INGINE_MAX_SEQS", "INGINE_MAX_NUM_SEQS"),
        ("INGINE_LEASE", "INGINE_LEASE_S"),
        ("ingine_qeue", "INGINE_QUEUE"),
        ("INGINE_SECRET_DIR", "INGINE_SECRETS_DIR"),
    ],
)
def test_a_misspelled_variable_names_the_one_that_is_meant(monkeypatch, load, name, meant):
    monkeypatch.setenv(name, "1")
    with pytest.raises(ConfigError, match=f"^{name.upper()} .in the environment.*did you mean {meant}"):
        load()


def test_a_misspelled_line_of_the_env_file_names_the_file(empty_folder):
    (empty_folder / ".env").write_text("INGINE_QEUE=a\nINGINE_LEASES=2\nOTHER=1\n")
    with pytest.raises(ConfigError) as caught:
        load_settings()
    assert str(caught.value).splitlines() == [
        f"INGINE_QEUE (in {empty_folder}/.env) is not a setting: did you mean INGINE_QUEUE?",
        f"INGINE_LEASES (in {empty_folder}/.env) is not a setting: did you mean INGINE_LEASE_S?",
    ]


def test_a_misspelled_secret_file_names_its_folder(empty_folder, monkeypatch):
    (empty_folder / "ingine_redis_urll").write_text("redis://x")
    (empty_folder / "tls.key").write_text("")
    monkeypatch.setenv("INGINE_SECRETS_DIR", str(empty_folder))
    with pytest.raises(ConfigError, match=f"INGINE_REDIS_URLL .in {empty_folder}"):
        load_settings()


def test_a_variable_unlike_all_of_ours_is_reported_and_ignored(monkeypatch):
    monkeypatch.setenv("INGINE_IMAGE_TAG", "1.2")
    monkeypatch.setenv("INGINE_VERSION", "1.2")
    assert sorted(check_variables()) == ["INGINE_IMAGE_TAG", "INGINE_VERSION"]
    load_settings()


def test_what_kubernetes_puts_into_a_pod_is_neither(monkeypatch):
    """The variables are those for Services named `ingine`, `ingine-http` and `ingine-queue` in the
    namespace."""
    for service in ("INGINE", "INGINE_HTTP", "INGINE_QUEUE"):
        links = {
            "SERVICE_HOST": "10.0.0.7",
            "SERVICE_PORT": "9464",
            "SERVICE_PORT_METRICS": "9464",
            "PORT": "tcp://10.0.0.7:9464",
            "PORT_9464_TCP": "tcp://10.0.0.7:9464",
            "PORT_9464_TCP_PROTO": "tcp",
            "PORT_9464_TCP_PORT": "9464",
            "PORT_9464_TCP_ADDR": "10.0.0.7",
        }
        for name, value in links.items():
            monkeypatch.setenv(f"{service}_{name}", value)
    assert check_variables() == []
    assert load_settings().http_port == 9464


@pytest.mark.parametrize("load", [load_settings, load_producer_settings], ids=["worker", "producer"])
def test_an_env_file_that_is_no_text_is_named(empty_folder, load):
    (empty_folder / ".env").write_bytes(b"INGINE_QUEUE=\xff\xfe\n")
    with pytest.raises(ConfigError, match=rf"{empty_folder}/\.env cannot be read: it is not UTF-8"):
        load()


def test_a_folder_called_env_is_no_env_file(empty_folder):
    (empty_folder / ".env").mkdir()
    assert load_settings().queue == "default"
