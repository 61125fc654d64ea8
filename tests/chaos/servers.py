"""The servers of a run, a primary with its replica or a cluster of three, and their faults and repairs."""

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Iterable
from pathlib import Path

from redis.asyncio import Redis
from redis.crc import key_slot
from redis.exceptions import RedisError

from ingine.worker.child import Child
from tests.chaos.proxy import HOST, ProxyProcess
from tests.servers import free_port, server_binary

OPTIONS = {
    "bind": HOST,
    "save": "",
    "appendonly": "yes",
    "appendfsync": "always",  # so that `kill -9` may lose nothing, and every lost token is a bug
    "maxmemory-policy": "noeviction",
    "repl-diskless-sync-delay": 0,
    "client-output-buffer-limit": "pubsub 32kb 16kb 1",
}
CUT_OFF = b"for overcoming of output buffer limits"
RUBBISH = b"rubbish" * 50_000
FLOOD_ROUNDS = 30
UP_TIMEOUT_S = 120.0
CLUSTER_SLOTS = 16384


class Node:
    """One server that can be killed and restarted on its files. `admin` bypasses the proxy."""

    def __init__(self, folder: Path, **options):
        self.folder = folder
        folder.mkdir(parents=True)
        self.port = free_port()
        self.options = {**OPTIONS, "port": self.port, "dir": folder, **options}
        self.admin = Redis(host=HOST, port=self.port, protocol=2, socket_timeout=10)
        self.front = 0
        """Its port at the proxy."""

    async def start(self) -> "Node":
        command = [str(server_binary())]
        for name, value in self.options.items():
            command += [f"--{name}", *str(value).split(" ")] if value != "" else [f"--{name}", ""]
        with (self.folder / "server.log").open("ab") as log:
            self._child = Child(command, output=log)
        await until(self.admin.ping, f"the server on port {self.port}")
        return self

    def num_cut_off(self) -> int:
        """Clients that exceeded `client-output-buffer-limit`, from the log: Redis 7.0 does not count them."""
        return (self.folder / "server.log").read_bytes().count(CUT_OFF)

    async def kill_and_restart(self, before_start: Callable[[], None] = lambda: None) -> None:
        os.kill(self._child.pid, signal.SIGKILL)
        self._child.stop()
        before_start()
        await self.start()

    async def stop(self) -> None:
        await self.admin.aclose()
        self._child.stop()


class Servers:
    """The interface of a run's servers. `url` leads through the proxy."""

    nodes: list[Node]
    url: str
    num_partitions = 1
    num_cut_off = 0
    """Subscribers that exceeded `client-output-buffer-limit` during `flood`."""

    def __init__(self, folder: Path, proxy: ProxyProcess, seed: int):
        self._folder, self._proxy, self._seed = folder, proxy, seed

    def target(self, draw: float) -> Node:
        """Select a node that serves."""
        return self.nodes[int(draw * len(self.nodes))]

    def owner(self, key: str) -> Redis:
        """A client, not through the proxy, of the node that has `key`."""
        return self.nodes[0].admin

    async def stop(self) -> None:
        for node in self.nodes:
            await node.stop()

    async def _listen(self, upstream: int) -> int:
        return await self._proxy.ask(listen=upstream, seed=f"{self._seed}:{upstream}")

    # ---------------------------------------------------------------------------------------- faults

    async def kill_server(self, node: Node) -> None:
        await node.kill_and_restart()

    async def kill_clients(self, node: Node) -> None:
        for kind in ("normal", "pubsub"):
            await node.admin.execute_command("CLIENT", "KILL", "TYPE", kind, "SKIPME", "yes")

    async def pause_server(self, node: Node, for_s: float) -> None:
        await node.admin.execute_command("CLIENT", "PAUSE", int(for_s * 1000), "ALL")

    async def fill_memory(self, node: Node, for_s: float) -> None:
        """Make the server refuse every command that may need memory, as if something else had used it up."""
        await self._for_a_while(node, "maxmemory", 1, 0, for_s)

    async def refuse_writes(self, node: Node, for_s: float) -> None:
        await self._for_a_while(node, "min-replicas-to-write", 2, 0, for_s)

    async def flood(self, rounds: int = FLOOD_ROUNDS) -> None:
        """Publish so much on every channel that a subscriber which does not read is cut off.

        rounds: maximum. The operating system's buffers have to fill too, which takes some megabytes.
        """
        for node in self.nodes:
            with contextlib.suppress(RedisError, OSError):
                before = cut_off = node.num_cut_off()
                for _ in range(rounds):
                    for channel in await node.admin.execute_command("PUBSUB", "SHARDCHANNELS", "*:channel:*"):
                        await node.admin.execute_command("SPUBLISH", channel, RUBBISH)
                    cut_off = node.num_cut_off()
                    if cut_off > before:
                        break
                self.num_cut_off += cut_off - before

    async def _for_a_while(self, node: Node, name: str, value: int, usual: int, for_s: float) -> None:
        await node.admin.config_set(name, value)
        await asyncio.sleep(for_s)
        await node.admin.config_set(name, usual)


class Pair(Servers):
    """A primary and its replica behind one port."""

    async def start(self) -> "Pair":
        first = await Node(self._folder / "first").start()
        second = await Node(self._folder / "second", replicaof=f"{HOST} {first.port}").start()
        self.nodes = [first, second]
        self.url = f"redis://{HOST}:{await self._listen(first.port)}/0"
        await self._synced()
        return self

    def target(self, draw: float) -> Node:
        return self.nodes[0]

    async def failover(self, cut: bool) -> None:
        """Make the replica take over once it has all writes. The old primary follows it."""
        await self._synced()
        primary, replica = self.nodes
        await primary.admin.execute_command("FAILOVER", "TO", HOST, replica.port)
        await until(lambda: _is_primary(replica), "the failover")
        self.nodes.reverse()
        replica.options.pop("replicaof")
        primary.options["replicaof"] = f"{HOST} {replica.port}"
        await self._proxy.ask(point=replica.port, front=0, cut=cut)

    async def _synced(self) -> None:
        async def synced() -> bool:
            return (await self.nodes[0].admin.info("replication")).get("slave0", {}).get("state") == "online"

        await until(synced, "the replica")


async def _is_primary(node: Node) -> bool:
    return (await node.admin.info("replication"))["role"] == "master"


class Cluster(Servers):
    """Three nodes without replicas. Each announces its own port at the proxy to clients."""

    num_partitions = 6

    async def start(self) -> "Cluster":
        self.nodes = []
        for number in range(3):
            bus = free_port()
            node = Node(
                self._folder / f"node{number}",
                **{
                    "cluster-enabled": "yes",
                    "cluster-port": bus,
                    "cluster-announce-ip": HOST,
                    "cluster-announce-bus-port": bus,
                    "cluster-node-timeout": 2000,
                    "cluster-require-full-coverage": "no",
                },
            )
            node.front, node.bus = number, bus
            node.announced = await self._listen(node.port)
            node.options["cluster-announce-port"] = node.announced
            self.nodes.append(await node.start())
        await self._form()
        self.url = "redis+cluster://" + ",".join(f"{HOST}:{node.announced}" for node in self.nodes)
        return self

    async def _form(self) -> None:
        share = CLUSTER_SLOTS // len(self.nodes) + 1
        for number, node in enumerate(self.nodes):
            last = min((number + 1) * share, CLUSTER_SLOTS) - 1
            await node.admin.execute_command("CLUSTER", "ADDSLOTSRANGE", number * share, last)
            node.slots = range(number * share, last + 1)
        for node in self.nodes[1:]:
            await node.admin.execute_command("CLUSTER", "MEET", HOST, self.nodes[0].port, self.nodes[0].bus)

        async def formed() -> bool:
            infos = [str(await node.admin.execute_command("CLUSTER", "INFO")) for node in self.nodes]
            return all("cluster_slots_ok:16384" in i and "cluster_state:ok" in i for i in infos)

        await until(formed, "the cluster")

    def owner(self, key: str) -> Redis:
        slot = key_slot(key.encode())
        return next(node.admin for node in self.nodes if slot in node.slots)


async def until(condition, what: str, errors: Iterable[type[Exception]] = (RedisError, OSError)) -> None:
    """Wait until the condition is true; these errors count as false.

    Raises TimeoutError after UP_TIMEOUT_S.
    """
    try:
        async with asyncio.timeout(UP_TIMEOUT_S):
            while True:
                with contextlib.suppress(*errors):
                    if await condition():
                        return
                await asyncio.sleep(0.03)
    except TimeoutError:
        raise TimeoutError(f"{what} is not there after {UP_TIMEOUT_S} s") from None
