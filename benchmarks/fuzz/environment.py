"""Fuzz settings of workers and clients, which come from variables, a `.env` file and files of secrets."""

import contextlib
import io
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from random import Random

import msgpack

import ingine.producer.settings
import ingine.worker.settings
from benchmarks.fuzz.mutations import TEXTS, damaged
from benchmarks.fuzz.running import outcome
from ingine.connect.environment import KNOWN_SETTINGS
from ingine.errors import ConfigError

CALLS_AT_LEAST, CALLS_PER_BYTE = 100_000, 200
"""Bounds of function calls. Without any input there are 50,000. python-dotenv makes up to 100 for a byte of
short lines, and twice as many for twice the lines."""

SECRET = "geheim77"
URLS = (
    f"redis://u:{SECRET}@h:1/0",
    f"redis://u:{SECRET}@h:x",
    f"redis://:{SECRET}@h/0?ssl=1",
    f"redis:{SECRET}",
)
NAMES = tuple(sorted(KNOWN_SETTINGS - {"cache_dir", "data_dir", "secrets_dir"}))
VALUES = (
    *("1", "0", "-1", "2GiB", "1.5k", "9" * 400, "1e400", "true", "int8", "auto", "cpu", "debug", "on"),
    *("ngram", "parked:x", "tcp://10.0.0.7:9464", "[1]", "{}", "q/x", "x" * 70, "# x", '"', "'x", "a=b"),
    *("${INGINE_QUEUE}", "$(x)"),
)  # fmt: skip


def cases(rng: Random) -> bytes:
    variables = dict(_setting(rng) for _ in range(rng.randrange(3)))
    secrets = dict(_setting(rng) for _ in range(rng.randrange(2)))
    lines = [b"=".join(_setting(rng)) for _ in range(rng.randrange(3))]
    file = b"\n".join(lines)
    if lines and rng.random() < 0.3:
        file = damaged(rng, file, (b"\n", b"=", b"export ", b'"', b"'", b"\xff", b"${"))
    return msgpack.packb([variables, file, secrets])


def _setting(rng: Random) -> tuple[bytes, bytes]:
    if rng.random() < 0.2:
        return b"INGINE_REDIS_URL", rng.choice(URLS).encode()
    return _name(rng), _value(rng)


def _name(rng: Random) -> bytes:
    name = "INGINE_" + rng.choice(NAMES).upper()
    kind = rng.random()
    if kind < 0.1:
        name = name[: rng.randrange(1, len(name))]
    elif kind < 0.2:
        name = name.lower()
    elif kind < 0.25:
        name += rng.choice(("_", "X", "é", "_SERVICE_HOST"))
    return name.encode()


def _value(rng: Random) -> bytes:
    raw = rng.choice((*VALUES, *TEXTS)).encode().replace(b"\x00", b"")
    return damaged(rng, raw, (b"\xff", b" ", b"\n")).replace(b"\x00", b"") if rng.random() < 0.2 else raw


def check(case: bytes) -> str:
    variables, file, secrets = msgpack.unpackb(case, strict_map_key=False)
    results = []
    with _surroundings(variables, file, secrets):
        for load in (ingine.worker.settings.load_settings, ingine.producer.settings.load_settings):
            try:
                _, result = outcome(load)
            except ConfigError as error:
                assert str(error) and SECRET not in str(error), f"it quotes a secret: {error}"
                result = "refused"
            results.append(result)
    return " and ".join(results)


@contextlib.contextmanager
def _surroundings(variables: dict[bytes, bytes], file: bytes, secrets: dict[bytes, bytes]) -> Iterator[None]:
    before, here = dict(os.environb), os.getcwd()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        (Path(folder) / "secrets").mkdir()
        (Path(folder) / ".env").write_bytes(file)
        for name, value in secrets.items():
            (Path(folder) / "secrets" / os.fsdecode(name)).write_bytes(value)
        for name in [name for name in before if name.startswith(b"INGINE_")]:
            del os.environb[name]
        os.environb.update({name: value.replace(b"\x00", b"") for name, value in variables.items()})
        os.environ["INGINE_SECRETS_DIR"] = str(Path(folder) / "secrets")
        os.chdir(folder)
        try:
            with warnings.catch_warnings(action="ignore"):
                yield
        finally:
            os.chdir(here)
            os.environb.clear()
            os.environb.update(before)
