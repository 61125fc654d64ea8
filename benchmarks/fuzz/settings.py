"""Fuzz a queue's settings and models, which a worker learns with its heartbeat and then acts on."""

import math
from collections.abc import Callable
from random import Random
from types import SimpleNamespace
from typing import Any

import msgpack

from benchmarks.fuzz.mutations import fields_case, text_bytes
from benchmarks.fuzz.queue_state import NOW_S, SETTINGS
from ingine.contract.jobs import decode_job
from ingine.worker.heartbeat import Heartbeat, _text
from ingine.worker.partition import Partition
from ingine.worker.shares import Shares
from tests.security.wire_properties import FULL_JOB, packed

MODELS = {b"m": b"1699999990", b"fingerprint": b"1699999990"}
JOB = packed(FULL_JOB)


def cases(rng: Random) -> bytes:
    settings = msgpack.unpackb(fields_case(rng, SETTINGS), strict_map_key=False)
    if rng.random() < 0.5:
        settings[b"weight:t"] = text_bytes(rng)
    models = msgpack.unpackb(fields_case(rng, MODELS), strict_map_key=False)
    return msgpack.packb([settings, models])


def check(case: bytes) -> str:
    settings, models = msgpack.unpackb(case, strict_map_key=False)
    partition = _partition(stop=lambda: None)
    partition._learn({_text(name): _text(value) for name, value in settings.items()})
    assert decode_job(JOB, max_bytes=max(partition.intake.max_job_bytes, len(JOB)))
    assert type(partition.intake.max_job_bytes) is int and partition.intake.max_job_bytes >= 0
    shares, arrivals = Shares(), []
    for num_tokens in (100, 1_000_000, 1):
        weight = partition.queue.weights.get("t", 1.0)
        arrivals.append(shares.enter(("t", "normal"), num_tokens, float(NOW_S), weight))
    assert arrivals == sorted(arrivals) and not any(map(math.isnan, arrivals))
    heartbeat = object.__new__(Heartbeat)
    heartbeat._in_contact_since_s = NOW_S - 60
    silences = {_text(name): heartbeat._silence_s(NOW_S, at_s) for name, at_s in models.items()}
    assert all(0 <= silence_s <= 60 or silence_s == math.inf for silence_s in silences.values())
    partition._learn_models(silences)
    return f"{len(partition.queue.weights)} weights, {len(partition.queue.served_elsewhere)} models"


def _partition(stop: Callable[[], None]) -> Partition:
    partition: Any = object.__new__(Partition)
    partition.intake = SimpleNamespace(max_job_bytes=1, paused=False, wake=lambda: None)
    model = SimpleNamespace(aliases=frozenset({"own"}))
    partition.queue = SimpleNamespace(weights={}, worker_id="w-1", model=model, model_wait_s=300.0)
    partition._stop = stop
    return partition
