"""Parses server URLs: of one server, of Sentinels, or of a cluster."""

import math
import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, urlsplit, urlunsplit

from redis import exceptions
from redis.asyncio.connection import (
    URL_QUERY_ARGUMENT_PARSERS,
    AbstractConnection,
    Connection,
    SSLConnection,
    parse_url,
)

URL_SCHEMES = (
    *("redis://", "rediss://", "unix://"),
    *("redis+sentinel://", "rediss+sentinel://", "redis+cluster://", "rediss+cluster://"),
)
POOL_OPTIONS = {"max_connections", "timeout"}
"""Options of a connection pool, not of a connection."""

_RELIED_ON = {
    *("protocol", "legacy_responses", "decode_responses", "encoding", "encoding_errors", "retry", "find"),
}
_TEXTS = {
    *("username", "password", "client_name"),
    *("ssl_keyfile", "ssl_certfile", "ssl_password", "ssl_ca_certs", "ssl_ca_data", "ssl_ca_path"),
    *("ssl_cert_reqs", "ssl_ciphers"),
}
"""Options whose values are text."""
_NOT_TEXTS = {
    *("db", "socket_timeout", "socket_connect_timeout", "socket_read_size", "socket_keepalive"),
    *("retry_on_timeout", "max_connections", "health_check_interval", "timeout"),
    *("ssl_check_hostname", "ssl_min_version", "ssl_include_verify_flags", "ssl_exclude_verify_flags"),
} & URL_QUERY_ARGUMENT_PARSERS.keys()
"""Options that redis-py converts to numbers and flags. Those of later versions of redis-py are refused."""
_POSITIVE = {
    *("socket_timeout", "socket_connect_timeout", "timeout", "socket_read_size", "max_connections"),
}
_NOT_NEGATIVE = {"db", "health_check_interval"}
_REFUSED = {
    *("host", "port", "path", "connection_class", "credential_provider", "driver_info", "encoder_class"),
    *("event_dispatcher", "himport_registry", "maint_notifications_config", "parser_class"),
    *("redis_connect_func", "retry_on_error", "socket_keepalive_options", "socket_type"),
    *("sentinel_username", "sentinel_password", "lib_name", "lib_version"),
}
"""Refused options whose names an error may quote. Any other name may be part of a password."""
_DATA_SERVERS_ONLY = {"username", "password", "db", *POOL_OPTIONS}
_SENTINELS_ONLY = {"sentinel_username": "username", "sentinel_password": "password"}
_UNREADABLE = "is no URL that can be read. In a user or password write @ : / ? # % as %40 %3A %2F %3F %23 %25"
_DEFAULT_PORTS = {"": 6379, "sentinel": 26379, "cluster": 6379}

Address = tuple[str, int]


@dataclass(frozen=True, repr=False)
class Location:
    """The contents of a URL. The repr is omitted, since the options hold the password."""

    kind: str
    """`sentinel`, `cluster`, or "" for one server."""
    addresses: list[Address]
    """Addresses of the server, of the Sentinels, or of some of the cluster's nodes."""
    service: str
    """The name that Sentinel has for the primary."""
    connection_class: type[AbstractConnection]
    """redis-py's class for the transport: TCP, TLS or a Unix socket."""
    options: dict[str, Any]
    """Options of connections to data servers, and of their pool."""
    sentinel_options: dict[str, Any]
    """Options of connections to Sentinels."""


def check_url(url: str) -> str:
    """Return `url` if it is valid. Raises ValueError, which never quotes a user or password."""
    parse_server_url(url)
    return url


def redact(url: str) -> str:
    """Return `url` without its password, for logs, and without its options, which may hold one too."""
    # Up to the last @: a user or password may have an unescaped / ? or @.
    return re.sub(r"//([^:]*):.*@", r"//\1:***@", url, flags=re.DOTALL).partition("?")[0]


def parse_server_url(url: str) -> Location:
    """Parse a URL. Raises ValueError, which never quotes a user or password."""
    if not url.startswith(URL_SCHEMES):
        raise ValueError(f"must begin with {', '.join(URL_SCHEMES[:-1])} or {URL_SCHEMES[-1]}")
    try:
        return _parse(url)
    except ValueError:
        if "@" in url.partition("?")[2]:  # the options may be the rest of a password
            raise ValueError(_UNREADABLE) from None
        raise


def _parse(url: str) -> Location:
    try:
        parts = urlsplit(url)
        transport, _, kind = parts.scheme.partition("+")
        user, at, hosts = parts.netloc.rpartition("@")
        addresses = [_address(host, _DEFAULT_PORTS[kind]) for host in hosts.split(",")]
        service, path = "", parts.path
        if kind == "sentinel":
            service, _, path = path.lstrip("/").partition("/")
        first = hosts.partition(",")[0]
        option_names = [option.partition("=")[0] for option in parts.query.split("&")]
        if "@" in "".join([parts.fragment, *option_names, service, "" if transport == "unix" else path]):
            raise ValueError("a part of the password was taken for another part of the URL")
        options = dict(parse_url(urlunsplit((transport, f"{user}{at}{first}", path, parts.query, ""))))
    except ValueError as error:  # its text may quote a part of the password
        if wrong := re.fullmatch(r"Invalid value for '(\w{1,40})' in connection URL.", str(error)):
            raise ValueError(f"has an option {wrong[1]} with a value that it cannot have") from None
        raise ValueError(_UNREADABLE) from None
    _check_names(parts.query, kind)
    if kind == "" and len(addresses) > 1:
        raise ValueError("names several servers: use redis+sentinel:// or redis+cluster://")
    if kind == "sentinel" and not service:
        raise ValueError("lacks the name of the primary, as in redis+sentinel://host:26379/NAME/0")
    if transport != "unix" and not re.fullmatch(r"/?\d*/?", path):
        raise ValueError("names a database that is no number: redis://host:6379/0 has number 0")
    if kind == "cluster" and options.get("db"):
        raise ValueError("names a database, and a cluster has only number 0")
    _check_numbers(options)
    return _location(kind, addresses, service, options)


def _check_numbers(options: dict[str, Any]) -> None:
    """Raise ValueError for a value that redis-py accepts, but with which no command could succeed."""
    for name, value in options.items():
        low = (name in _POSITIVE and not value > 0) or (name in _NOT_NEGATIVE and value < 0)
        if low or value == math.inf:
            raise ValueError(f"has an option {name} with a value that it cannot have")


def _check_names(query: str, kind: str) -> None:
    """Raise ValueError for options that a URL cannot set.

    redis-py accepts any option of its connections, and fails only when it connects with any other. How a
    later version treats a new option is not known.
    """
    names = parse_qs(query).keys()
    if refused := names & _RELIED_ON:
        raise ValueError(f"must not set {', '.join(sorted(refused))}, which ingine relies on")
    of_sentinels = _SENTINELS_ONLY.keys() if kind == "sentinel" else set()
    unknown = names - _TEXTS - _NOT_TEXTS - of_sentinels
    for name in sorted(unknown):
        # After a password it may be the rest of the password.
        can_be_quoted = name in _REFUSED and "password=" not in query.partition(name)[0]
        named = f"an option {name}" if can_be_quoted else "an option"
        raise ValueError(f"has {named} that the URL of a server cannot have")


def _address(host: str, default_port: int) -> Address:
    parts = urlsplit(f"//{host}")
    return parts.hostname or "localhost", parts.port or default_port


def _location(kind: str, addresses: list[Address], service: str, options: dict[str, Any]) -> Location:
    connection_class = options.pop("connection_class", Connection)
    sentinel_options = {}
    if kind == "sentinel":
        theirs = {name: options.pop(given) for given, name in _SENTINELS_ONLY.items() if given in options}
        sentinel_options = {n: value for n, value in options.items() if n not in _DATA_SERVERS_ONLY} | theirs
    if kind:
        for options_of in (options, sentinel_options):
            options_of.pop("host", None)
            options_of.pop("port", None)
    _try_options(connection_class, options)
    return Location(kind, addresses, service, connection_class, options, sentinel_options)


def _try_options(connection_class: type[AbstractConnection], options: dict[str, Any]) -> None:
    """Raise ValueError for options unknown to redis-py, and for certificates that cannot be read."""
    try:
        connection = connection_class(**{n: value for n, value in options.items() if n not in POOL_OPTIONS})
        if isinstance(connection, SSLConnection):
            connection.ssl_context.get()
    except TypeError as error:
        unknown = re.search(r"unexpected keyword argument '(\w{1,40})'", str(error))
        named = f"an option {unknown[1]}" if unknown else "an option"
        raise ValueError(f"has {named} that redis-py's connections do not know") from None
    except (exceptions.RedisError, OSError) as error:
        raise ValueError(f"has an option that cannot be used: {error}") from None
    except Exception:
        raise ValueError("has an option with a value that it cannot have") from None
