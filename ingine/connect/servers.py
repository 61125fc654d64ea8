"""Clients for a queue's partitions: on one server, on the primary that Sentinel names, or in a cluster.

A partition lies on one server at any time, so its client is redis-py's plain one. Its connections are not
plain (`ingine.connect.connections`): each looks up its server when it connects, and closes when the server
answers that it is the wrong one. The caller of that command gets a ConnectionError, and may send the command
again as after any other.
"""

from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Any

from redis import exceptions
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.sentinel import Sentinel
from redis.backoff import EqualJitterBackoff, NoBackoff
from redis.crc import key_slot

from ingine.connect.connections import (
    DATA_CONNECTIONS,
    DefaultServerConnection,
    RetryUnlessRefused,
    discovery_client,
)
from ingine.connect.local_server import DefaultServer, default_data_dir, no_embedded_server, running_url
from ingine.connect.url import Address, Location, parse_server_url, redact
from ingine.contract.keys import Keys
from ingine.errors import ConfigError

TIMEOUT_S = 5.0

_UNLIMITED = 2**31


class Servers:
    """The clients for a queue's partitions, from one URL. All of them belong to one event loop."""

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

        url: None means the default server, see `ingine.connect.local_server`.
        retries: how often a client itself sends a command again after the connection broke, each time at most
        a second later. 0 means never: the caller knows which commands may be repeated.
        timeout_s: limit for connecting, and for each answer.
        max_connections: limit for each client; a command that needs one more waits. The URL may set another
        number. None means no limit, whatever the URL says, so that partitions never wait for each other.
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
        retry = RetryUnlessRefused(EqualJitterBackoff(cap=1.0, base=0.1) if retries else NoBackoff(), retries)
        self._options = {"max_connections": max_connections, "retry": retry} | common | location.options
        if max_connections is None:
            self._options["max_connections"] = _UNLIMITED
        self._cluster = _Cluster(location, common | location.options)
        self._sentinel = Sentinel([])
        if location.kind == "sentinel":
            options = common | location.sentinel_options
            self._sentinel.sentinels = [
                discovery_client(location.connection_class, address, options)
                for address in location.addresses
            ]
        self._clients: dict[int, Redis] = {}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._redacted!r})"

    @property
    def where(self) -> str:
        """The servers' addresses, for messages. It has no password in it."""
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
        """The place where no embedded server was found, for messages.

        Empty if one runs, or none was looked for.
        """
        with suppress(ConfigError):  # a user without a home has none
            if self._default and not running_url(data_dir := default_data_dir()):
                return f" ({no_embedded_server(data_dir)})"
        return ""

    def client(self, keys: Keys) -> Redis:
        """The client for one partition's keys. Partitions that can only lie on one server share a client."""
        slot = key_slot(keys.prefix.encode()) if self._location.kind == "cluster" else 0
        if slot not in self._clients:
            location_class = DATA_CONNECTIONS[self._location.connection_class]
            pool = BlockingConnectionPool(
                connection_class=DefaultServerConnection if self._default else location_class,
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
    """Finds the node that owns a slot, by asking one node after the other."""

    def __init__(self, location: Location, options: dict[str, Any]):
        self._connection_class, self._options = location.connection_class, options
        self._seeds = self._nodes = location.addresses

    async def owner(self, slot: int) -> Address:
        """The address of the node that owns `slot`. Raises ConnectionError if no node knows it."""
        reason: Exception | None = None
        for node in self._nodes:
            try:
                ranges = await self._ask(node)
            except exceptions.AuthenticationError:  # the other nodes would refuse us too
                raise
            except (exceptions.ConnectionError, exceptions.TimeoutError) as error:
                reason = error
                continue
            # The next call asks another node first: a node cut off from the others answers what it last knew.
            known = dict.fromkeys([*(owner for _, _, owner in ranges), *self._seeds])
            self._nodes = [*(other for other in known if other != node), node]
            for first, last, owner in ranges:
                if first <= slot <= last:
                    return owner
        raise exceptions.ConnectionError(
            f"no node of the cluster knows the owner of slot {slot}: {reason or 'it has none'}"
        ) from reason

    async def _ask(self, node: Address) -> list[tuple[int, int, Address]]:
        """First slot, last slot and owner of each range of slots that has an owner."""
        async with discovery_client(self._connection_class, node, self._options) as redis:
            ranges = await redis.execute_command("CLUSTER SLOTS")
        # An empty host stands for the address at which the node was asked.
        return [
            (first, last, (host.decode() if host else node[0], port))
            for first, last, (host, port, *_), *_ in ranges
        ]
