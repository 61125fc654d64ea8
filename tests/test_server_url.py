"""A Redis URL that cannot be used: what is wrong with it is named, at once."""

import pytest

from ingine.errors import ConfigError
from producer import AsyncClient, Client, ServerUnavailable


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
        ("redis://h?health_check=1", "option health_check that"),
        ("redis+sentinel://h/primary?colour=red", "option colour that"),
        ("redis://h?maint_notifications_config=x", "option with a value that it cannot have"),
    ],
)
def test_what_is_wrong_is_named(url: str, says: str):
    with pytest.raises(ConfigError, match=f"INGINE_REDIS_URL.*{says}"):
        AsyncClient(url)


@pytest.mark.parametrize(
    "url", ["redis://h", "redis://h/", "redis://h:6379/3", "redis://h/3/", "unix:///a/b"]
)
def test_what_is_right_is_taken(url: str):
    assert AsyncClient(url).queue


def test_a_database_that_the_server_does_not_have(redis_url: str, monkeypatch: pytest.MonkeyPatch):
    """One error at once, and no waiting for it to pass."""
    monkeypatch.setattr("producer.token_log.GIVE_UP_S", 1000.0)
    url = redis_url.replace("/0", "/99999")
    with Client(url) as client:
        for call in (lambda: client.submit("hi"), lambda: client.attach("x").result(60)):
            with pytest.raises(ServerUnavailable, match=r"no database 99999.*INGINE_REDIS_URL"):
                call()
