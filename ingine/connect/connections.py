"""redis-py's connections, adapted: each looks up its server when it connects, and closes when the server
answers that it is the wrong one."""

from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from redis import exceptions
from redis.asyncio import Connection, ConnectionPool, Redis, SSLConnection
from redis.asyncio.connection import AbstractConnection, UnixDomainSocketConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.utils import HIREDIS_AVAILABLE

from ingine.connect.server_errors import NoSuchDatabase, WrongServer, is_refusal, wrong_server_reason
from ingine.connect.url import POOL_OPTIONS, Address, parse_server_url
from ingine.errors import ConfigError

if HIREDIS_AVAILABLE:
    import hiredis


class _RedactErrors(AbstractConnection):
    """Mixin that keeps passwords and prompts out of error messages."""

    async def read_response(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return await super().read_response(*args, **kwargs)
        except exceptions.ResponseError as error:
            # A server that does not know a command quotes its arguments.
            text, quoted, _ = str(error).partition(", with args beginning with:")
            if quoted:
                error.args = (text,)
            raise


class _LocateServer(_RedactErrors):
    """Mixin of the connections to data servers.

    find: called before each connect for the server's address. None: the URL names the address.
    """

    def __init__(self, *, find: Callable[[], Awaitable[Address]] | None = None, **options: Any):
        super().__init__(**options)
        self._find = find

    async def connect_check_health(self, *args: Any, **kwargs: Any) -> None:
        if self._find and not self.is_connected:
            self.host, self.port = await self._find()
            kwargs["retry_socket_connect"] = False  # the address may be out of date at a second attempt
        await super().connect_check_health(*args, **kwargs)

    async def on_connect_check_health(self, *args: Any, **kwargs: Any) -> None:
        """Ask for redirects: without them a demoted primary keeps answering reads with what it had. Only
        Valkey 8 and later know the command."""
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
        """Encode a command in C where hiredis is installed.

        redis-py's asyncio connections use hiredis for replies alone, and its own packer for hiredis inspects
        each argument in Python first.
        """
        if not HIREDIS_AVAILABLE:
            return super().pack_command(*args)
        name, *arguments = args
        try:
            return [hiredis.pack_command((*name.split(), *arguments))]  # "SCRIPT LOAD" is two words
        except TypeError:
            # redis-py encodes bytearrays, and raises DataError for types that it does not accept.
            return super().pack_command(*args)

    async def read_response(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return await super().read_response(*args, **kwargs)
        except exceptions.ResponseError as error:
            if (reason := wrong_server_reason(error)) is None:
                raise
            await self.disconnect(nowait=True)
            raise WrongServer(f"{self._host_error()}: {reason}") from error


class _TcpConnection(_LocateServer, Connection):
    pass


class _TlsConnection(_LocateServer, SSLConnection):
    pass


class _UnixConnection(_LocateServer, UnixDomainSocketConnection):
    pass


class DefaultServerConnection(_TcpConnection):
    """A connection to the default server, whose address and password are looked up at each connect.

    find: returns the server's URL, or raises ConfigError. See `ingine.connect.local_server`.
    """

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


DATA_CONNECTIONS = {
    Connection: _TcpConnection,
    SSLConnection: _TlsConnection,
    UnixDomainSocketConnection: _UnixConnection,
}
"""redis-py's class -> the class of connections to data servers."""

_DISCOVERY_CONNECTIONS = {
    kind: type(f"_Discovery{kind.__name__}", (_RedactErrors, kind), {}) for kind in DATA_CONNECTIONS
}
"""redis-py's class -> the class of connections to Sentinels, and to nodes that are asked for slots."""


class RetryUnlessRefused(Retry):
    """redis-py's retries, but not after a refusal: a refused password or certificate is refused again."""

    async def call_with_retry(self, do: Any, fail: Any, is_retryable: Any = None, **options: Any) -> Any:
        def may_pass(error: Exception) -> bool:
            return not is_refusal(error) and (is_retryable is None or is_retryable(error))

        return await super().call_with_retry(do, fail, may_pass, **options)


class _DiscoveryClient(Redis):
    def __repr__(self) -> str:
        """The address alone: redis-py's Sentinel puts this into its errors."""
        return "{host}:{port}".format(**self.connection_pool.connection_kwargs)


def discovery_client(
    connection_class: type[AbstractConnection], address: Address, options: dict[str, Any]
) -> Redis:
    """A client for one Sentinel or cluster node. It never retries, since the caller can ask another one."""
    of_connection = {name: value for name, value in options.items() if name not in POOL_OPTIONS}
    of_connection |= {"host": address[0], "port": address[1], "retry": Retry(NoBackoff(), 0)}
    pool = ConnectionPool(connection_class=_DISCOVERY_CONNECTIONS[connection_class], **of_connection)
    return _DiscoveryClient.from_pool(pool)
