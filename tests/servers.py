"""Real servers: one, a cluster, and a primary with a replica and a Sentinel.

All run on loopback, on free ports, and end with the test process. They are Valkey's, from the wheel, unless
the variable TEST_SERVER names another `redis-server` or `valkey-server`.
"""

import os
import random
import re
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import pytest
import redis
from redis.crc import key_slot

from ingine.worker.child import Child
from ingine.worker.embedded import EmbeddedServer, find_binary
from tests.waiting import wait_until

HOST = "127.0.0.1"
NUM_SLOTS = 16384
SERVICE = "primary"
"""The Sentinel's name for the primary."""
PATIENT_MS = 120_000
"""A busy machine may stall a server for this long without any reaction of the Sentinel."""


def server_binary() -> Path:
    binary = Path(os.environ.get("TEST_SERVER") or find_binary())
    assert binary.is_file(), f"TEST_SERVER names {binary}, which is no file"
    return binary


def server_version(binary: Path) -> tuple[str, tuple[int, ...]]:
    """Name (Redis or Valkey) and version of a binary."""
    said = subprocess.run([binary, "--version"], capture_output=True, text=True, check=True).stdout
    name, version = re.match(r"(\w+) server v=([\d.]+)", said).groups()
    return name, tuple(map(int, version.split(".")))


class OpenServer(EmbeddedServer):
    """An embedded server without a password, for tests that put users of their own into its URL."""

    @property
    def url(self) -> str:
        return f"redis://{HOST}:{self.port}/0"

    def _read_or_make_password(self) -> str:
        return '""'


def durable_server(folder: Path, *, port: int = 0) -> EmbeddedServer:
    """An embedded server with the tests' binary and no password."""
    return OpenServer(folder, port=port, binary=server_binary())


class Valkey:
    """A `valkey-server` or `redis-server` with any options. It keeps port and folder when started again.

    binary: None means the binary of all tests.
    """

    def __init__(
        self,
        folder: Path,
        *,
        binary: Path | None = None,
        password: str = "",
        config: str = "",
        **options: object,
    ):
        folder.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self._folder = folder
        self._binary = binary or server_binary()
        arguments = {"port": self.port, "bind": HOST, "dir": folder, "save": '""'}
        arguments |= {"repl_diskless_sync_delay": 0, **options}
        if password:
            arguments["requirepass"] = password
        lines = [f"{name.replace('_', '-')} {value}" for name, value in arguments.items()]
        (folder / "valkey.conf").write_text("\n".join([*lines, config, ""]))
        self.admin = redis.Redis(HOST, self.port, password=password or None, decode_responses=True)

    @property
    def address(self) -> str:
        return f"{HOST}:{self.port}"

    def start(self, *flags: str) -> Self:
        with (self._folder / "valkey.log").open("ab") as log:
            command = [str(self._binary), str(self._folder / "valkey.conf"), *flags]
            self._child = Child(command, output=log)
        wait_until(self.answers, what=f"the server in {self._folder}")
        return self

    def answers(self) -> bool:
        try:
            return self.admin.ping()
        except redis.RedisError:
            return False

    def kill(self) -> None:
        """Kill the server with `kill -9`."""
        self._child.kill()

    def stop(self) -> None:
        self._child.stop()
        self.admin.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_) -> None:
        self.stop()


@dataclass
class Cluster:
    """Three primaries, no replicas."""

    nodes: list[Valkey]

    @property
    def url(self) -> str:
        return f"redis+cluster://{','.join(node.address for node in self.nodes)}"

    def owner(self, key: str) -> Valkey:
        slot = key_slot(key.encode())
        for first, last, (_, port, *_), *_ in self.nodes[0].admin.execute_command("CLUSTER SLOTS"):
            if first <= slot <= last:
                return next(node for node in self.nodes if node.port == port)
        raise LookupError(f"slot {slot} is nobody's")

    def begin_move(self, key: str) -> tuple[Valkey, Valkey]:
        """Start moving the key's slot, key by key. Returns the source and the target node."""
        source = self.owner(key)
        target = next(node for node in self.nodes if node is not source)
        slot = key_slot(key.encode())
        target.admin.execute_command("CLUSTER SETSLOT", slot, "IMPORTING", node_id(source))
        source.admin.execute_command("CLUSTER SETSLOT", slot, "MIGRATING", node_id(target))
        return source, target

    def end_move(self, key: str, source: Valkey, target: Valkey) -> None:
        """Move the remaining keys, and with them the slot."""
        slot = key_slot(key.encode())
        while keys := source.admin.execute_command("CLUSTER GETKEYSINSLOT", slot, 100):
            source.admin.execute_command("MIGRATE", HOST, target.port, "", 0, 5000, "KEYS", *keys)
        for node in (target, source, *self.nodes):
            node.admin.execute_command("CLUSTER SETSLOT", slot, "NODE", node_id(target))

    def move(self, key: str) -> None:
        """Move the slot of `key` to another node."""
        self.end_move(key, *self.begin_move(key))


@contextmanager
def cluster(folder: Path, **options: object) -> Iterator[Cluster]:
    """Start a cluster with these options of every node. A dead node makes only its own slots unavailable."""
    with ExitStack() as stack:
        nodes = [
            stack.enter_context(
                Valkey(
                    folder / f"node-{n}",
                    appendonly="yes",
                    cluster_enabled="yes",
                    cluster_port=free_port(),
                    cluster_node_timeout=15_000,
                    cluster_require_full_coverage="no",
                    **options,
                )
            )
            for n in range(3)
        ]
        bounds = [NUM_SLOTS * n // len(nodes) for n in range(len(nodes) + 1)]
        for node, first, end in zip(nodes, bounds, bounds[1:], strict=False):
            node.admin.execute_command("CLUSTER ADDSLOTSRANGE", first, end - 1)
            bus_port = node.admin.config_get("cluster-port")["cluster-port"]
            nodes[0].admin.execute_command("CLUSTER MEET", HOST, node.port, bus_port)
        wait_until(lambda: all(map(_knows_all, nodes)), what="a cluster of three")
        yield Cluster(nodes)


def _knows_all(node: Valkey) -> bool:
    info = node.admin.execute_command("CLUSTER INFO")
    info = info if isinstance(info, dict) else dict(line.split(":") for line in info.split())
    return (info["cluster_state"], info["cluster_slots_ok"]) == ("ok", str(NUM_SLOTS))


def node_id(node: Valkey) -> str:
    return node.admin.execute_command("CLUSTER MYID")


@dataclass
class Watched:
    """A primary and a replica, which may change roles, and the Sentinel that watches them."""

    servers: list[Valkey]
    sentinel: Valkey

    @property
    def url(self) -> str:
        return f"redis+sentinel://{self.sentinel.address}/{SERVICE}/0"

    @property
    def primary(self) -> Valkey:
        _, port = self.sentinel.admin.execute_command("SENTINEL GET-MASTER-ADDR-BY-NAME", SERVICE)
        return next(server for server in self.servers if server.port == int(port))

    def kill_primary(self) -> None:
        """Kill the primary with `kill -9`. Returns once the replica has taken over."""
        old = self.primary
        old.kill()
        self._tolerate_silence(300)
        wait_until(lambda: self.primary is not old, what="the failover")
        self._tolerate_silence(PATIENT_MS)

    def _tolerate_silence(self, ms: int) -> None:
        self.sentinel.admin.execute_command("SENTINEL SET", SERVICE, "down-after-milliseconds", ms)

    def change_places(self) -> None:
        """Make a planned failover, as before maintenance, which loses no write.

        Returns once it is complete.
        """
        old = self.primary
        wait_until(self._hand_over, what="a replica that can take over")
        wait_until(lambda: self.primary is not old, what="the hand-over")

    def _hand_over(self) -> bool:
        try:
            return self.sentinel.admin.execute_command("SENTINEL FAILOVER", SERVICE, "COORDINATED")
        except redis.ResponseError as error:
            assert "wrong number of arguments" not in str(error), "see `skip_without_hand_over`"
            return False  # the Sentinel does not yet know enough of the replica

    def skip_without_hand_over(self) -> None:
        """Skip the test if the Sentinel has no planned failover, as Redis's has none."""
        try:
            self.sentinel.admin.execute_command("SENTINEL FAILOVER", "nobody", "COORDINATED")
        except redis.ResponseError as error:
            if "wrong number of arguments" in str(error):
                pytest.skip("SENTINEL FAILOVER ... COORDINATED is Valkey 9's")


@contextmanager
def watched_pair(folder: Path, *, password: str = "", sentinel_password: str = "") -> Iterator[Watched]:
    options = {"appendonly": "yes", "password": password}
    if password:
        options["masterauth"] = password
    with ExitStack() as stack:
        first = stack.enter_context(Valkey(folder / "first", **options))
        second = stack.enter_context(Valkey(folder / "second", replicaof=f"{HOST} {first.port}", **options))
        wait_until(
            lambda: second.admin.info("replication")["master_link_status"] == "up", what="a replica in step"
        )
        config = f"""
sentinel monitor {SERVICE} {HOST} {first.port} 1
sentinel down-after-milliseconds {SERVICE} {PATIENT_MS}
sentinel failover-timeout {SERVICE} 2000
"""
        if password:
            config += f"sentinel auth-pass {SERVICE} {password}\n"
        sentinel = Valkey(folder / "sentinel", password=sentinel_password, config=config)
        stack.callback(sentinel.stop)
        sentinel.start("--sentinel")
        wait_until(
            lambda: sentinel.admin.execute_command("SENTINEL REPLICAS", SERVICE), what="the Sentinel's view"
        )
        yield Watched([first, second], sentinel)


def free_port() -> int:
    """A free port below 32768, where no outgoing connection can take it while its server restarts."""
    while True:
        port = random.randrange(20000, 32000)
        with socket.socket() as probe:
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return port
