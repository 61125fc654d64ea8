"""Fuzz heartbeats, settings and numbers of a queue, which `ingine queue show` reads."""

import contextlib
import dataclasses
import io
import json
from random import Random

import msgpack

from benchmarks.fuzz.logs import LONGEST_MESSAGE
from benchmarks.fuzz.mutations import fields_case, packed_case, text_bytes
from benchmarks.fuzz.running import finished, outcome
from ingine.cli.queue import _print_queue
from ingine.contract.keys import Keys, read_num_partitions
from ingine.errors import ClientError
from ingine.producer.queue_info import merge, num_serving, read_partition
from ingine.worker.heartbeat import last_beat_s

NOW_S = 1_700_000_000
HEARTBEAT = {
    "name": "w", "state": "serving", "model": "m", "fingerprint": "f", "version": "0.1.0", "num_jobs": 3,
    "num_running": 2, "num_waiting": 1, "kv_usage": 0.5, "at_s": NOW_S - 1,
}  # fmt: skip
SETTINGS = {
    b"max_jobs": b"100", b"max_bytes": b"1000000", b"max_job_bytes": b"1000", b"max_jobs_per_s": b"2.5",
    b"partitions": b"1", b"weight:t": b"2", b"paused": b"1", b"drain:w-1": b"1",
}  # fmt: skip


def cases(rng: Random) -> bytes:
    workers = {b"w-1": packed_case(rng, HEARTBEAT), text_bytes(rng): packed_case(rng, HEARTBEAT)}
    settings = msgpack.unpackb(fields_case(rng, SETTINGS), strict_map_key=False)
    return msgpack.packb([workers, settings, text_bytes(rng) if rng.random() < 0.2 else b"7"])


def check(case: bytes) -> str:
    workers, settings, num_bytes = msgpack.unpackb(case, strict_map_key=False)
    assert 0 <= finished(num_serving(Server([workers, (NOW_S, 0)]), Keys("q"))) <= len(workers)
    for raw in workers.values():
        last_beat_s(raw)
    outcome(lambda: read_num_partitions(settings.get(b"partitions")), ValueError)
    pending = {"consumers": [{"name": b"w-1", "pending": 2}, {"name": b"waiting", "pending": 9}]}
    answers = [*([3, pending] * 3), 1, num_bytes, settings, workers, 4, (NOW_S, 0)]
    partitions, result = outcome(lambda: finished(read_partition(Server(answers), Keys("q"))), ClientError)
    if partitions is None:
        return result
    try:
        info = merge("q", [partitions, partitions])
    except ClientError as error:
        assert len(str(error)) <= LONGEST_MESSAGE
        return "refused"
    assert all(heartbeat["silent_s"] == heartbeat["silent_s"] for heartbeat in info.workers.values())
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        _print_queue(info)
    assert json.dumps(dataclasses.asdict(info), allow_nan=False)
    return "valid"


class Server:
    """A client whose one pipeline gets the given answers."""

    def __init__(self, answers: list):
        self._answers = answers

    def pipeline(self, transaction: bool) -> "Server":
        return self

    def __getattr__(self, name: str):
        return lambda *_, **__: self

    async def execute(self, **_) -> list:
        return self._answers
