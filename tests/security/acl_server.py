"""A real server with the access control list of deploy/redis, and a log of its clients' commands."""

import hashlib
import re
import shutil
import socket
import subprocess
import threading
from collections import defaultdict
from pathlib import Path
from typing import Self
from urllib.parse import quote

from redis import Redis, RedisError

from ingine.contract.roles import CHANNELS, KINDS, Role, tags_of, user_line
from ingine.worker.child import Child
from tests.docs.tables import ROOT
from tests.servers import server_binary, server_version
from tests.waiting import HANGS_S, wait_until

DOCUMENT = ROOT / "docs" / "howto" / "secure.md"
USERS_FILE = ROOT / "deploy" / "redis" / "users.acl"
SERVER_CONF = ROOT / "deploy" / "redis" / "server.conf"
ROLES = tuple(map(str, Role))
NARROWED = "narrowed"
"""A queue with users of its own in the file."""

LAST = "the last command"
KIND_OF = {end.partition(":")[0]: kind for kind, end in (KINDS | CHANNELS).items()}
KEY = re.compile(r"ingine:\{[\w.-]+\}:(\w+)")
CONTAINERS = {"XGROUP", "XINFO", "SCRIPT", "CLIENT", "CONFIG", "CLUSTER", "ACL"}


def password_of(role: str) -> str:
    """A password with every character that has a meaning in a URL."""
    return f"{role}:p@ss/w?rd#%41"


class AclServer:
    """A server with the configuration and users of deploy/redis, and an `admin` who may do everything."""

    def __init__(
        self, folder: Path, *, binary: Path | None = None, as_it_is: bool = False, maxmemory: str = "1gb"
    ):
        """binary: None means the binary of all tests.

        as_it_is: without the lines that the document says to add.
        """
        self._folder = folder
        self._maxmemory = maxmemory
        self._binary = binary or server_binary()
        self._as_it_is = as_it_is
        self.users: dict[str, str] = {}
        """User by address, of the connections that were open at some call of `look`."""

    def __enter__(self) -> Self:
        aclfile = self._folder / "users.acl"
        shutil.copy(USERS_FILE, aclfile)
        for command in self._for_this_server():
            subprocess.run(command, shell=True, cwd=self._folder, check=True)
        users = aclfile.read_text()
        for role in ROLES:
            digest = hashlib.sha256(password_of(role).encode()).hexdigest()
            users = users.replace(f"SHA256-OF-{role.upper()}-PASSWORD", digest)
        narrowed = "\n".join(_lines(NARROWED, partitioned=True))
        aclfile.write_text(f"{users}{narrowed}\nuser admin on >admin ~* &* +@all\n")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.log = self._folder / "server.log"
        self.admin = Redis.from_url(f"redis://admin:admin@127.0.0.1:{self.port}/0")
        self._start()
        return self

    def _start(self) -> None:
        options = {
            "bind": "127.0.0.1",
            "port": str(self.port),
            "save": "",
            "aclfile": str(self._folder / "users.acl"),
            "dir": str(self._folder),
            "maxmemory": self._maxmemory,
            "busy-reply-threshold": "100",
        }
        flags = [part for name, value in options.items() for part in (f"--{name}", value)]
        with self.log.open("ab") as output:
            self._child = Child([str(self._binary), str(SERVER_CONF), *flags], output=output)
        wait_until(self._answers, what="the server with an aclfile")

    def kill_and_start(self) -> None:
        """Kill the server with `kill -9`, and restart it on its files."""
        self._child.kill()
        self._start()

    def _for_this_server(self) -> list[str]:
        """Change the file as the document says for this kind of server."""
        name, version = server_version(self._binary)
        pattern = r"^    (sed .*users\.acl) +# (\w+) (\S+) and later$"
        lines = re.findall(pattern, DOCUMENT.read_text(), re.MULTILINE)
        assert {kind for _, kind, _ in lines} == {"Valkey", "Redis"}
        return [
            command
            for command, kind, since in lines
            if not self._as_it_is and kind == name and version >= tuple(map(int, since.split(".")))
        ]

    def __exit__(self, *_) -> None:
        self.admin.close()
        self._child.stop()

    def _answers(self) -> bool:
        assert self._child.running, self.log.read_text()
        try:
            return self.admin.ping()
        except RedisError:
            return False

    def look(self) -> None:
        self.users |= {client["addr"]: client["user"] for client in self.admin.client_list()}

    def url(self, role: str, queue: str = "ingine") -> str:
        """The URL for a role. queue: a queue with users of its own, see `add_users`."""
        return f"redis://{queue}-{role}:{quote(password_of(role), safe='')}@127.0.0.1:{self.port}/0"

    def add_users(self, queue: str, *, partitioned: bool = False) -> None:
        """Add the users that `ingine acl` prints for one queue."""
        for line in _lines(queue, partitioned=partitioned):
            _, user, rules = line.split(maxsplit=2)
            self.admin.execute_command("ACL", "SETUSER", user, *rules.split())

    def refusals(self, role: str) -> set[str]:
        """The commands, keys or channels that the server has refused to this role since `forget_refusals`."""
        return {entry["object"] for entry in self.admin.acl_log(128) if entry["username"] == f"ingine-{role}"}

    def forget_refusals(self) -> None:
        """Forget the refusals of other tests on this server."""
        self.admin.acl_log_reset()


def _lines(queue: str, *, partitioned: bool) -> list[str]:
    tags = tags_of(queue, partitioned=partitioned)
    digests = {role: hashlib.sha256(password_of(role).encode()).hexdigest() for role in Role}
    return [user_line(role, f"{queue}-{role}", digest, tags) for role, digest in digests.items()]


class CommandLog:
    """Records which user sends which commands on which kinds of keys and channels, from MONITOR.

    Commands of a user's scripts count as the user's.
    """

    def __init__(self, server: AclServer):
        self._server = server
        self._by_address: dict[str, set[tuple[str, str]]] = defaultdict(set)
        self._monitoring = threading.Event()
        self._thread = threading.Thread(target=self._monitor)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._monitoring.wait(HANGS_S)
        return self

    def __exit__(self, *_) -> None:
        self._server.admin.echo(LAST)
        self._thread.join()

    def used(self, role: str) -> set[tuple[str, str]]:
        """Pairs of command and kind, as in `contract.roles`. The kind is '' for a command without a key."""
        users = self._server.users.items()
        return set().union(*(self._by_address[at] for at, user in users if user == f"ingine-{role}"))

    def _monitor(self) -> None:
        address = ""
        with self._server.admin.monitor() as monitor:
            self._monitoring.set()
            while LAST not in (line := monitor.next_command())["command"]:
                if line["client_type"] != "lua":  # a script's commands follow its EVALSHA
                    address = f"{line['client_address']}:{line['client_port']}"
                first, _, rest = line["command"].upper().partition(" ")
                name = f"{first}|{rest.split()[0]}" if first in CONTAINERS else first
                key = KEY.search(line["command"]) if name != "EVALSHA" else None
                self._by_address[address].add((name, KIND_OF[key[1]] if key else ""))
