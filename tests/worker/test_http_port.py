"""Two workers on one machine, and ports that cannot be had."""

import socket
from collections.abc import Iterator

import pytest

from ingine.errors import ConfigError
from ingine.worker.http_port import with_usable_port
from ingine.worker.settings import WorkerSettings


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        yield listener.getsockname()[1]


def settings(**given) -> WorkerSettings:
    return WorkerSettings(_env_file=None, **given)


def test_a_second_worker_takes_any_free_port(taken, caplog):
    first = WorkerSettings.model_construct(http_host="127.0.0.1", http_port=taken, _fields_set=set())
    assert with_usable_port(first).http_port == 0
    assert caplog.records[0].message == "http port taken" and caplog.records[0].fields == {"port": taken}


def test_a_port_that_was_asked_for_is_an_error_before_a_model_is_loaded(taken):
    with pytest.raises(
        ConfigError, match=rf"INGINE_HTTP_PORT .--http-port.: cannot listen on 127.0.0.1:{taken}: "
    ):
        with_usable_port(settings(http_port=taken))


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid"])
def test_an_address_of_another_machine_is_named(host):
    with pytest.raises(ConfigError, match=rf"INGINE_HTTP_HOST .--http-host.: {host} is no address of this"):
        with_usable_port(settings(http_host=host, http_port=19464))


@pytest.mark.parametrize("port", [0, -1])
def test_nothing_is_asked_where_any_port_will_do(port):
    assert with_usable_port(settings(http_port=port)).http_port == port
