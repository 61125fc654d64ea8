"""Redis URLs that cannot be used: an error names the fault at once."""

import pytest
from redis.asyncio.connection import URL_QUERY_ARGUMENT_PARSERS

from ingine.errors import ConfigError
from ingine.producer import AsyncClient, Client, ServerUnavailable


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("redis://h:6379/zero", "names a database that is no number"),
        ("redis://h:6379/-1", "names a database that is no number"),
        ("redis://h:6379/0/1", "names a database that is no number"),
        ("redis+sentinel://h/primary/zero", "names a database that is no number"),
        ("redis+cluster://h/zero", "names a database that is no number"),
        ("redis://h?db=zero", "option db with a value"),
        ("redis://h?socket_timeout=soon", "option socket_timeout with a value"),
        ("redis://h?health_check=1", "an option that the URL of a server cannot have"),
        ("redis+sentinel://h/primary?colour=red", "an option that the URL of a server cannot have"),
        *(
            (f"redis://h?{name}={value}", f"option {name} with a value")
            for name in ("socket_timeout", "socket_connect_timeout", "timeout")
            for value in ("nan", "inf", "-inf", "-1", "0", "x")
        ),
        ("redis://h?socket_read_size=0", "option socket_read_size with a value"),
        ("redis://h?max_connections=0", "option max_connections with a value"),
        ("redis://h?health_check_interval=-1", "option health_check_interval with a value"),
        ("unix:///a?db=-1", "option db with a value"),
        # Options of redis-py's connections, except objects, which text cannot be.
        ("redis://h?maint_notifications_config=x", "option maint_notifications_config that"),
        ("redis://h?redis_connect_func=x", "option redis_connect_func that"),
        ("redis://h?redis_connect%5Ffunc=x", "option redis_connect_func that"),
        ("redis://h?credential_provider=x", "option credential_provider that"),
        ("redis+cluster://h?retry_on_error=x", "option retry_on_error that"),
        ("unix:///a?event_dispatcher=x", "option event_dispatcher that"),
        ("rediss://h?socket_keepalive_options=x", "option socket_keepalive_options that"),
        ("redis+sentinel://h/primary?himport_registry=x", "option himport_registry that"),
        ("redis://h?connection_class=x", "option connection_class that"),
        ("redis://h?host=other", "option host that"),
        ("redis://h?sentinel_password=x", "option sentinel_password that"),
        ("redis://h?lib_name=x", "option lib_name that"),
        ("redis://h?legacy_responses=no", "must not set legacy_responses"),
    ],
)
def test_what_is_wrong_is_named(url: str, says: str):
    with pytest.raises(ConfigError, match=f"INGINE_REDIS_URL.*{says}"):
        AsyncClient(url)


@pytest.mark.parametrize(
    "url",
    [
        *("redis://h", "redis://h/", "redis://h:6379/3", "redis://h/3/", "unix:///a/b"),
        "redis://h?db=1&username=u&password=p&socket_timeout=1&max_connections=9&health_check_interval=3",
        "redis://h?client_name=me&socket_keepalive=yes&retry_on_timeout=no",
        "rediss://h?ssl_check_hostname=no&ssl_cert_reqs=none&ssl_min_version=771&ssl_ciphers=ALL",
        "redis+sentinel://h/primary?sentinel_username=u&sentinel_password=p&timeout=5",
    ],
)
def test_what_is_right_is_taken(url: str):
    assert AsyncClient(url).queue


@pytest.mark.parametrize(
    "url",
    [
        "redis://user:12?secret=x@host:6379/0",
        "redis://user:12?host=secret@host:6379/0",
        "redis://user:12?db=secret@host:6379/0",
        "rediss://user:12?ssl_cert_reqs=secret@host:6379/0",
        "redis://h?password=x&secret=1",
        "redis://h?secret=1",
    ],
)
def test_what_may_be_a_part_of_a_password_is_not_quoted(url: str):
    with pytest.raises(ConfigError) as refused:
        AsyncClient(url)
    assert "secret" not in str(refused.value) and "option host" not in str(refused.value)


def test_an_option_that_redis_py_gets_later_is_refused(monkeypatch: pytest.MonkeyPatch):
    """A new option is refused until its effect has been reviewed."""
    parsers = {**URL_QUERY_ARGUMENT_PARSERS, "new_option": int}
    for module in ("redis.asyncio.connection", "ingine.connect.url"):
        monkeypatch.setattr(f"{module}.URL_QUERY_ARGUMENT_PARSERS", parsers)
    with pytest.raises(ConfigError, match="has an option that the URL of a server cannot have"):
        AsyncClient("redis://h?new_option=1")


def test_a_database_that_the_server_does_not_have(redis_url: str, monkeypatch: pytest.MonkeyPatch):
    """There is one error at once, and no retry."""
    monkeypatch.setattr("ingine.producer.token_log.GIVE_UP_S", 1000.0)
    url = redis_url.replace("/0", "/99999")
    with Client(url) as client:
        for call in (lambda: client.submit("hi"), lambda: client.attach("x").result(60)):
            with pytest.raises(ServerUnavailable, match=r"no database 99999.*INGINE_REDIS_URL"):
                call()
