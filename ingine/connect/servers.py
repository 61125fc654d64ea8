"""Clients for a queue's partitions: on one server, on the primary that Sentinel names, or in a cluster.

A partition lies on one server at any time, so its client is redis-py's plain one. What is special is its
connections: each asks where its server is when it connects, and breaks off when it is told that it is at the
wrong one. Whoever sent the command meets a ConnectionError, and may send it again as after any other.
"""

import ssl
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Any

from redis import exceptions
from redis.asyncio import BlockingConnectionPool, Connection, ConnectionPool, Redis, SSLConnection
from redis.asyncio.connection import AbstractConnection, UnixDomainSocketConnection
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import EqualJitterBackoff, NoBackoff
from redis.crc import key_slot
from redis.utils import HIREDIS_AVAILABLE

from ingine.connect.local_server import DefaultServer, default_data_dir, no_embedded_server, running_url
from ingine.connect.url import POOL_OPTIONS, Address, Location, parse_server_url, redact
from ingine.contract.keys import Keys
from ingine.errors import ConfigError

if HIREDIS_AVAILABLE:
    import hiredis

TIMEOUT_S = 5.0

_UNLIMITED = 2**31

_MOVING = "the queue moves to another node of its cluster"
_WRONG_SERVER_ERRORS = {
    exceptions.ReadOnlyError: "it is a read-only replica",
    exceptions.MasterDownError: "it is a replica without its primary",
    exceptions.ClusterDownError: "its cluster is down, or has nobody for the queue's slot",
    exceptions.MovedError: "another node of its cluster has the queue (INGINE_REDIS_URL begins with "
    "redis+cluster:// there)",
    # Going where ASK points would not help: a script touches several keys, and is served by neither node as
    # long as they are not all on one. It ends well once the slot has moved.
    exceptions.AskError: _MOVING,
    exceptions.TryAgainError: _MOVING,
}
_WRONG_SERVER_CODES = {
    "REDIRECT": "it is a read-only replica",
    "UNBLOCKED": "it broke off a blocking read, as a primary does that becomes a replica",
    "NOREPLICAS": "it has lost its replicas, so another may be the primary by now",
}


class NoSuchDatabase(exceptions.AuthenticationError):
    """The server has no database of this number. As final as a password that is refused."""


class WrongServer(exceptions.ConnectionError):
    """The keys are elsewhere, for now at least. The connection is closed; the next one asks anew."""


class _QuotesNothing(AbstractConnection):
    """Mixed into redis-py's connections: no error of theirs has a password or a prompt in it."""

    async def read_response(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return await super().read_response(*args, **kwargs)
        except exceptions.ResponseError as error:
            # Who does not know a command quotes what came with it.
            text, quoted, _ = str(error).partition(", with args beginning with:")
            if quoted:
                error.args = (text,)
            raise


class _FindsItsServer(_QuotesNothing):
    """Mixed into redis-py's connections. `find`: asked where to connect to; None where the URL says it."""

    def __init__(self, *, find: Callable[[], Awaitable[Address]] | None = None, **options: Any):
        super().__init__(**options)
        self._find = find

    async def connect_check_health(self, *args: Any, **kwargs: Any) -> None:
        if self._find and not self.is_connected:
            self.host, self.port = await self._find()
            kwargs["retry_socket_connect"] = False  # at an address that may be out of date by then
        await super().connect_check_health(*args, **kwargs)

    async def on_connect_check_health(self, *args: Any, **kwargs: Any) -> None:
        """A demoted primary goes on to answer those who only read, with what it had. Valkey 8 has a cure."""
        try:
            await super().on_connect_check_health(*args, **kwargs)
        except exceptions.ResponseError as error:
            if "DB index" not in str(error):
                raise
            raise NoSuchDatabase(f"it has no database {self.db} ({error})") from error
        await self.send_command("CLIENT", "CAPA", "redirect", check_health=False)
        with suppress(exceptions.ResponseError):  # Redis does not know it, and an ACL may forbid it
            await self.read_response()

    def pack_command(self, *args: Any) -> list[bytes]:
        """In C where hiredis is installed. By themselves asyncio connections have it for replies alone, and
        redis-py's own way to it looks at each argument in Python first."""
        if not HIREDIS_AVAILABLE:
            return super().pack_command(*args)
        name, *arguments = args
        try:
            return [hiredis.pack_command((*name.split(), *arguments))]  # "SCRIPT LOAD" is two words
        except TypeError:
            return super().pack_command(*args)  # bytearrays, and DataError for what is none of its types

    async def read_response(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return await super().read_response(*args, **kwargs)
        except exceptions.ResponseError as error:
            if (what := _what_is_wrong(error)) is None:
                raise
            await self.disconnect(nowait=True)
            raise WrongServer(f"{self._host_error()}: {what}") from error


class _Retry(Retry):
    """But not of what would end the same way again: a password, or a certificate, that is refused."""

    async def call_with_retry(self, do: Any, fail: Any, is_retryable: Any = None, **options: Any) -> Any:
        def may_pass(error: Exception) -> bool:
            return not is_refusal(error) and (is_retryable is None or is_retryable(error))

        return await super().call_with_retry(do, fail, may_pass, **options)


def is_refusal(error: BaseException | None) -> bool:
    """Of a password, or of a certificate, by the error or by what it came from."""
    kinds = (exceptions.AuthenticationError, ssl.SSLCertVerificationError)
    return error is not None and (
        isinstance(error, kinds) or is_refusal(error.__cause__ or error.__context__)
    )


def is_lacking(answer: object) -> bool:
    """Whether the answer is that the server does not know a command, or a proxy does not pass it on."""
    text = str(answer).lower()
    signs = ("unknown command", "unknown subcommand", "unknown redis command", "unsupported", "not supported")
    return (
        isinstance(answer, exceptions.ResponseError)
        and any(sign in text for sign in signs)
        and "wrong number of arguments" not in text  # which Redis 6 says in one breath with the subcommand
    )


def _what_is_wrong(error: exceptions.ResponseError) -> str | None:
    """With the server, that is. None: it is the right one."""
    for kind, what in _WRONG_SERVER_ERRORS.items():
        if isinstance(error, kind):
            return what
    return _WRONG_SERVER_CODES.get(str(error).partition(" ")[0])


class _TcpConnection(_FindsItsServer, Connection):
    pass


class _TlsConnection(_FindsItsServer, SSLConnection):
    pass


class _UnixConnection(_FindsItsServer, UnixDomainSocketConnection):
    pass


class _LocalConnection(_TcpConnection):
    """To the server of those who name none. Which that is, and its password, is looked up for each
    connection."""

    def __init__(self, *, find: Callable[[], str], **options: Any):
        super().__init__(**options)
        self._find_url = find

    async def connect_check_health(self, *args: Any, **kwargs: Any) -> None:
        if not self.is_connected:
            try:
                found = parse_server_url(self._find_url()).options
            except (ConfigError, ValueError) as error:
                raise exceptions.ConnectionError(str(error)) from None
            self.host, self.port, self.password = found["host"], found["port"], found.get("password")
            kwargs["retry_socket_connect"] = False
        await super().connect_check_health(*args, **kwargs)


_OURS = {
    Connection: _TcpConnection,
    SSLConnection: _TlsConnection,
    UnixDomainSocketConnection: _UnixConnection,
}


_ASKED = {kind: type(f"_Asked{kind.__name__}", (_QuotesNothing, kind), {}) for kind in _OURS}


class Servers:
    """The clients for a queue's partitions, by one URL. For use in one event loop."""

    def __init__(
        self,
        url: str | None,
        *,
        client_name: str,
        retries: int = 0,
        timeout_s: float = TIMEOUT_S,
        max_connections: int | None = None,
    ):
        """Does not connect yet. Raises ConfigError, naming INGINE_REDIS_URL, if the URL cannot be used.

        url: None: the server of those who name none, see `ingine.connect.local_server`.
        retries: how often a client sends a command again by itself after the connection broke, at most a
        second later each time. 0: never; the caller knows what may be repeated.
        timeout_s: for connecting, and for each answer.
        max_connections: of one client. Whoever needs one more waits for it. The URL may name another number.
        None: no limit, whatever the URL says, for whom partitions must not wait for each other.
        """
        self._default = DefaultServer() if url is None else None
        url = self._default.find() if self._default else url
        try:
            location = parse_server_url(url)
        except ValueError as error:
            raise ConfigError(f"INGINE_REDIS_URL (--redis-url) {error}") from None
        self._redacted = redact(url)
        self._location = location
        common = {
            "socket_connect_timeout": timeout_s,
            "socket_timeout": timeout_s,
            "client_name": client_name,
            "protocol": 2,
        }
        retry = _Retry(EqualJitterBackoff(cap=1.0, base=0.1) if retries else NoBackoff(), retries)
        self._options = {"max_connections": max_connections, "retry": retry} | common | location.options
        if max_connections is None:
            self._options["max_connections"] = _UNLIMITED
        self._cluster = _Cluster(location, common | location.options)
        self._sentinel = Sentinel([])
        if location.kind == "sentinel":
            options = common | location.sentinel_options
            self._sentinel.sentinels = [
                _ask_server(location.connection_class, address, options) for address in location.addresses
            ]
        self._clients: dict[int, Redis] = {}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._redacted!r})"

    @property
    def where(self) -> str:
        """The servers as a message may name them: no password in it."""
        location = self._location
        if self._default:
            with suppress(ValueError):
                location = parse_server_url(self._default.last_url)
        hosts = ",".join(f"{host}:{port}" for host, port in location.addresses)
        match location.kind:
            case "sentinel":
                return f"{location.service} of Sentinel {hosts}"
            case "cluster":
                return f"cluster {hosts}"
            case _:
                return location.options.get("path", hosts)

    @property
    def looked_in(self) -> str:
        """Where an embedded server was looked for in vain, for a message; else empty."""
        with suppress(ConfigError):  # a user without a home has none
            if self._default and not running_url(data_dir := default_data_dir()):
                return f" ({no_embedded_server(data_dir)})"
        return ""

    def client(self, keys: Keys) -> Redis:
        """The client for one partition's keys; another partition's too if the two never part."""
        slot = key_slot(keys.prefix.encode()) if self._location.kind == "cluster" else 0
        if slot not in self._clients:
            ours = _LocalConnection if self._default else _OURS[self._location.connection_class]
            pool = BlockingConnectionPool(
                connection_class=ours,
                find=self._find(slot),
                **self._options,
            )
            self._clients[slot] = Redis.from_pool(pool)
        return self._clients[slot]

    def _find(self, slot: int) -> Callable[[], Awaitable[Address] | str] | None:
        if self._default:
            return self._default.find
        if self._location.kind == "cluster":
            return partial(self._cluster.owner, slot)
        if self._location.kind == "sentinel":
            return partial(self._sentinel.discover_master, self._location.service)
        return None

    async def aclose(self) -> None:
        """Close all connections. Safe to call twice."""
        for redis in [*self._clients.values(), *self._sentinel.sentinels]:
            await redis.aclose()


class _Cluster:
    """Tells who has a slot, by asking one node after the other."""

    def __init__(self, location: Location, options: dict[str, Any]):
        self._connection_class, self._options = location.connection_class, options
        self._seeds = self._nodes = location.addresses

    async def owner(self, slot: int) -> Address:
        """Raises ConnectionError if no node can tell."""
        reason: Exception | None = None
        for node in self._nodes:
            try:
                ranges = await self._ask(node)
            except exceptions.AuthenticationError:  # the next one would not let us in either
                raise
            except (exceptions.ConnectionError, exceptions.TimeoutError) as error:
                reason = error
                continue
            # The next time another is asked first: one that the rest has left behind answers what it knew.
            known = dict.fromkeys([*(owner for _, _, owner in ranges), *self._seeds])
            self._nodes = [*(other for other in known if other != node), node]
            for first, last, owner in ranges:
                if first <= slot <= last:
                    return owner
        raise exceptions.ConnectionError(
            f"no node of the cluster can tell who has slot {slot}: {reason or 'it has no owner'}"
        ) from reason

    async def _ask(self, node: Address) -> list[tuple[int, int, Address]]:
        """First slot, last slot and owner of each range that has one."""
        async with _ask_server(self._connection_class, node, self._options) as redis:
            ranges = await redis.execute_command("CLUSTER SLOTS")
        # A node that gives no host means the one at which it was asked.
        return [
            (first, last, (host.decode() if host else node[0], port))
            for first, last, (host, port, *_), *_ in ranges
        ]


class _Asked(Redis):
    """As the errors of redis-py's Sentinel show it."""

    def __repr__(self) -> str:
        return "{host}:{port}".format(**self.connection_pool.connection_kwargs)


def _ask_server(
    connection_class: type[AbstractConnection], address: Address, options: dict[str, Any]
) -> Redis:
    """A client for one node or Sentinel. Whoever asks knows another, so it never tries twice."""
    of_connection = {name: value for name, value in options.items() if name not in POOL_OPTIONS}
    of_connection |= {"host": address[0], "port": address[1], "retry": Retry(NoBackoff(), 0)}
    return _Asked.from_pool(ConnectionPool(connection_class=_ASKED[connection_class], **of_connection))
