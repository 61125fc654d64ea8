"""Configuration lines in documents are accepted by Valkey, and by Redis where it is installed."""

import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import trustme
from redis import Redis, exceptions

from tests.docs.tables import ROOT, table
from tests.security.acl_server import NARROWED, ROLES, AclServer
from tests.servers import HOST, Valkey, free_port, server_binary, server_version

SECURITY = (ROOT / "docs" / "security.md").read_text()
OPERATIONS = (ROOT / "docs" / "operations.md").read_text()
SECURE = (ROOT / "docs" / "howto" / "secure.md").read_text()
REDIS_SERVERS = "docs/howto/redis.md"
REDIS_PAGE = " ".join((ROOT / REDIS_SERVERS).read_text().split())
RELIABILITY = (ROOT / "docs" / "reliability.md").read_text()
SERVER_CONF = ROOT / "deploy" / "redis" / "server.conf"
BINARIES = {server_binary()} | {Path(path) for path in [shutil.which("redis-server")] if path}


@pytest.fixture(params=sorted(BINARIES), ids=lambda path: path.name)
def binary(request: pytest.FixtureRequest) -> Path:
    return request.param


def lines_of(document: str, first_word: str) -> list[str]:
    """The configuration lines in code blocks that begin with this word, without their comments."""
    found = re.findall(rf"^    ({first_word}[^#\n]*)", document, re.MULTILINE)
    assert found, first_word
    return [line.strip() for line in found]


def test_the_configuration_in_deploy_is_taken_as_it_is(tmp_path, binary):
    lines = [line.partition("#")[0].split(maxsplit=1) for line in SERVER_CONF.read_text().splitlines()]
    wanted = [(name, value) for name, value in filter(None, lines)]
    with Valkey(tmp_path, binary=binary, config=f"include {SERVER_CONF}\nmaxmemory 100mb") as server:
        for name, value in wanted:
            if name != "client-output-buffer-limit":
                assert server.admin.config_get(name) == {name: value}
        [limits] = server.admin.config_get("client-output-buffer-limit").values()
    assert f"normal {1 << 30} {256 << 20} 60" in limits and f"pubsub {32 << 20} {8 << 20} 60" in limits
    assert len(wanted) == 6


def test_the_table_of_settings(tmp_path, binary):
    rows = {row["setting"]: row["value"] for row in table(REDIS_SERVERS, "Settings of the server")}
    given = {name: value for name, value in rows.items() if re.fullmatch(r"[a-z]+", value)}
    assert given == {"maxmemory-policy": "noeviction", "appendonly": "yes", "appendfsync": "everysec"}
    defaults = {n: v.removesuffix(", its default") for n, v in rows.items() if v.endswith(", its default")}
    with Valkey(tmp_path, binary=binary, **given) as server:
        for name, value in given.items():
            assert server.admin.config_get(name)[name] == value
        assert defaults == {"timeout": "0", "client-output-buffer-limit pubsub": "32mb 8mb 60"}
        assert server.admin.config_get("timeout") == {"timeout": "0"}
        [limits] = server.admin.config_get("client-output-buffer-limit").values()
        assert f"pubsub {32 << 20} {8 << 20} 60" in limits
        server.admin.config_set("min-replicas-to-write", 1)
        assert "`min-replicas-to-write 1`" in REDIS_PAGE


def test_defaults_that_the_text_names(tmp_path, binary):
    assert "128 entries by default" in SECURITY and "`busy-reply-threshold` | 5000, its default" in SECURE
    with Valkey(tmp_path, binary=binary) as server:
        assert server.admin.config_get("acllog-max-len") == {"acllog-max-len": "128"}
        assert server.admin.config_get("busy-reply-threshold") == {"busy-reply-threshold": "5000"}


def test_names_that_servers_answer_for_their_certificates(tmp_path, binary):
    node = "\n".join(lines_of(SECURE, "cluster-")).replace("NAME", "node-1.example")
    server = "\n".join(lines_of(SECURE, "replica-announce-ip")).replace("NAME", "node-1.example")
    options = {"cluster_enabled": "yes", "cluster_port": free_port(), "config": f"{node}\n{server}"}
    with Valkey(tmp_path / "node", binary=binary, **options) as node:
        node.admin.execute_command("CLUSTER ADDSLOTSRANGE", 0, 16383)
        [[_, _, [name, *_]]] = node.admin.execute_command("CLUSTER SLOTS")
        assert name == "node-1.example"
    with Valkey(tmp_path / "server", binary=binary) as primary:
        lines = [*lines_of(SECURE, "sentinel"), f"sentinel monitor primary localhost {primary.port} 1"]
        sentinel = Valkey(tmp_path / "sentinel", binary=binary, config="\n".join(lines))
        try:
            sentinel.start("--sentinel")
            address = sentinel.admin.execute_command("SENTINEL GET-MASTER-ADDR-BY-NAME", "primary")
            assert address == ("localhost", primary.port)
        finally:
            sentinel.stop()


def test_a_server_that_takes_tls_alone(tmp_path, binary):
    said = "A server with `port 0` and `tls-port 6379` takes no other connections."
    assert said in " ".join(SECURE.split())
    authority, port = trustme.CA(), free_port()
    without_files = subprocess.run([binary, "--port", "0", "--tls-port", str(port)], capture_output=True)
    if b"Failed finding TLS support" in without_files.stdout:
        pytest.skip(f"this {binary.name} is built without TLS")
    certificate = authority.issue_cert(HOST)
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    certificate.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    certificate.cert_chain_pems[0].write_to_path(str(tmp_path / "cert.pem"))
    files = {"tls-cert-file": "cert.pem", "tls-key-file": "key.pem", "tls-ca-cert-file": "ca.pem"}
    config = "\n".join(f"{name} {tmp_path / file}" for name, file in files.items())
    config += f"\ntls-auth-clients no\nport 0\ntls-port {port}"
    server = Valkey(tmp_path / "server", binary=binary, config=config)
    options = {"ssl": True, "ssl_ca_certs": str(tmp_path / "ca.pem"), "decode_responses": True}
    server.admin = Redis(HOST, port, **options)
    try:
        server.start()
        assert server.admin.ping()
        with Redis(HOST, server.port) as plain, pytest.raises(exceptions.ConnectionError):
            plain.ping()
    finally:
        server.stop()


def test_commands_that_the_text_names_exist(tmp_path, binary):
    name, version = server_version(binary)
    with Valkey(tmp_path, binary=binary, cluster_enabled="yes", cluster_port=free_port()) as server:
        for command in ("SLOWLOG GET", "SCRIPT KILL", "FAILOVER", "CLUSTER SLOTS"):
            assert command.removesuffix(" GET") in OPERATIONS + SECURE + SECURITY + RELIABILITY
            assert known(server, command.replace(" ", "|")), command
        migrates = known(server, "CLUSTER|MIGRATESLOTS")
        assert "`CLUSTER MIGRATESLOTS` (Valkey 9)" in REDIS_PAGE
        assert migrates == (name == "Valkey" and version >= (9,))


def known(server: Valkey, command: str) -> bool:
    return server.admin.execute_command("COMMAND INFO", command) not in ({}, [None])


# ------------------------------------------------------------------------------------- the access list


@pytest.mark.parametrize("as_it_is", [True, False])
def test_the_access_list_loads(tmp_path, binary, as_it_is):
    with AclServer(tmp_path, binary=binary, as_it_is=as_it_is) as server:
        for role in ROLES:
            for url in (server.url(role), server.url(role, NARROWED)):
                with Redis.from_url(url) as redis:
                    assert redis.ping()


def test_the_digest_of_a_password_is_made_as_the_document_says():
    [command] = re.findall(r'^    (printf %s "\$PASSWORD" \| sha256sum)', SECURE, re.MULTILINE)
    done = subprocess.run(
        command, shell=True, env=os.environ | {"PASSWORD": "a b"}, capture_output=True, text=True, check=True
    )
    assert done.stdout.split()[0] == hashlib.sha256(b"a b").hexdigest()
