"""Fuzz URLs of servers: each is usable, or refused with a ValueError that quotes no secret."""

from inspect import signature
from random import Random

from redis.asyncio.connection import AbstractConnection, Connection, SSLConnection

from benchmarks.fuzz.mutations import TEXTS, damaged
from ingine.connect.url import URL_SCHEMES, parse_server_url, redact

SECRET = "geheim77"
HOSTS = (
    "localhost",
    "127.0.0.1:6379",
    "[::1]:7000",
    "a:1,b:2",
    "a,b,c",
    "",
    "a:99999",
    "[::1",
    "a:x",
    "é.test",
)
PATHS = ("", "/", "/0", "/15", "/x", "/primary/0", "/tmp/redis.sock", "//", "/-1", "/" + "9" * 5000)
KINDS = (Connection, SSLConnection, AbstractConnection)
OPTIONS = (
    *sorted({name for kind in KINDS for name in signature(kind).parameters}),
    *("db", "max_connections", "timeout", "connection_class", "sentinel_username", "sentinel_password", "x"),
)
VALUES = (
    "",
    "0",
    "1",
    "-1",
    "1.5",
    "none",
    "true",
    "required",
    "/dev/null",
    "/",
    "x",
    "%00",
    "%ff",
    "[]",
    "nan",
)
WORDS = (b"@", b":", b"/", b"?", b"#", b"%", b"[", b"]", b"&", b"=", b",", b"//", b"\x00", b"\n", b"\xc3\xa9")


def cases(rng: Random) -> bytes:
    user = rng.choice(("", f"user:{SECRET}@", f":{SECRET}@", f"{SECRET}@"))
    url = rng.choice(URL_SCHEMES) + user + rng.choice(HOSTS) + rng.choice(PATHS)
    if options := [rng.choice(OPTIONS) for _ in range(rng.choice((0, 1, 1, 2)))]:
        url += "?" + "&".join(f"{name}={rng.choice((*VALUES, *TEXTS))}" for name in options)
    raw = url.encode()
    return damaged(rng, raw, WORDS) if rng.random() < 0.4 else raw


def check(case: bytes) -> str:
    url = case.decode(errors="surrogateescape")
    try:
        location = parse_server_url(url)
    except ValueError as error:
        assert SECRET not in str(error), f"it quotes a secret: {error}"
        return "refused"
    assert location.kind in ("", "sentinel", "cluster") and location.addresses
    if SECRET in url and f"{SECRET}@" in url and url.count(SECRET) == 1 and f":{SECRET}" in url:
        assert SECRET not in redact(url)
    return location.kind or "one server"
