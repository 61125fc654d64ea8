"""The gateway's settings: flags, variables, and what is refused before it listens."""

import socket

import pytest
import typer
import typer.main
from typer.testing import CliRunner

import ingine.gateway.serve
from ingine.cli.main import app
from ingine.errors import ConfigError
from ingine.gateway.serve import listen
from ingine.gateway.settings import GatewaySettings, flag_of, load_settings
from tests.servers import HOST


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_every_setting_is_a_flag_without_its_prefix():
    command = typer.main.get_command(app).commands["gateway"]
    flags = {option for each in command.get_params(typer.Context(command)) for option in each.opts}
    assert flags >= {flag_of(name) for name in GatewaySettings.model_fields}
    assert flag_of("gateway_port") == "--port" and flag_of("redis_url") == "--redis-url"


def test_flags_win_over_variables(monkeypatch):
    monkeypatch.setenv("INGINE_GATEWAY_PORT", "8001")
    monkeypatch.setenv("INGINE_GATEWAY_MAX_BODY_BYTES", "1MiB")
    served = []
    monkeypatch.setattr(ingine.gateway.serve, "serve", served.append)
    result = CliRunner().invoke(app, ["gateway", "--port", "8002", "--queue", "q", "--without-keys"])
    assert result.exit_code == 0, result
    (settings,) = served
    assert (settings.gateway_port, settings.gateway_max_body_bytes) == (8002, 1 << 20)
    assert settings.queue == "q" and settings.gateway_without_keys


def test_a_wrong_value_names_variable_and_flag():
    with pytest.raises(ConfigError, match=r"INGINE_GATEWAY_PING_S \(--ping-s\): .*greater than 0"):
        load_settings(gateway_ping_s=0)


def test_a_service_of_kubernetes_does_not_set_the_port(monkeypatch):
    monkeypatch.setenv("INGINE_GATEWAY_PORT", "tcp://10.0.0.7:8000")
    assert load_settings().gateway_port == 8000


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "gateway.example.com"])
def test_without_keys_it_serves_no_other_machine(host):
    with pytest.raises(ConfigError, match=r"INGINE_GATEWAY_HOST .*INGINE_GATEWAY_KEYS"):
        load_settings(gateway_host=host)
    assert load_settings(gateway_host=host, gateway_without_keys=True).gateway_host == host
    assert load_settings(gateway_host=host, gateway_keys="keys.json").gateway_host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_without_keys_it_serves_this_machine(host):
    assert load_settings(gateway_host=host).is_on_loopback


def test_a_port_in_use_is_named():
    with socket.create_server((HOST, 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"INGINE_GATEWAY_PORT \(--port\).*{HOST}:{port}"):
            listen(GatewaySettings(gateway_port=port))


def test_a_host_of_another_machine_is_named():
    with pytest.raises(ConfigError, match=r"INGINE_GATEWAY_HOST \(--host\): no\.such\.host\.invalid"):
        listen(GatewaySettings(gateway_host="no.such.host.invalid"))
