"""Guarantees when processes die, with real workers, a real server and real signals."""

import os
import signal
import subprocess
import sys
from collections import Counter

import pytest
import redis

from ingine.contract.events import decode_event
from ingine.contract.keys import Keys
from ingine.producer import Client, JobHandle, JobStatus
from ingine.worker.embedded import EmbeddedServer
from ingine.worker.identity import name_of
from tests.crash.conftest import LONG
from tests.servers import durable_server
from tests.waiting import HANGS_S, wait_until

PROMPTS = [f"Story number {number}: once upon a time, " for number in range(40)]


def logged_token_ids(server: EmbeddedServer, queue: str, job_id: str) -> list[int]:
    """The token ids of a job's log, which has each position 1..N once, and then the terminal event once."""
    with redis.Redis.from_url(server.url) as connection:
        entries = connection.xrange(Keys(queue).tokens(job_id))
    events = [(entry_id.decode(), decode_event(fields[b"event"])) for entry_id, fields in entries]
    token_ids = []
    for entry_id, event in events[:-1]:
        token_ids += event.token_ids
        assert entry_id == f"{len(token_ids)}-0" and event.position == len(token_ids)
    end_id, end = events[-1]
    assert end_id == f"{len(token_ids)}-1" and end.status is JobStatus.FINISHED
    return token_ids


def held_by(handles: list[JobHandle], worker: str, *, at_least: int) -> list[str]:
    """The ids of the jobs that `worker` runs, each with some tokens; none if fewer than `at_least`."""
    infos = [handle.status() for handle in handles]
    held = [
        info.job_id for info in infos if info.worker and name_of(info.worker) == worker and info.position > 3
    ]
    return held if len(held) >= at_least else []


def assert_nothing_is_left(server: EmbeddedServer, queue: str) -> None:
    keys = Keys(queue)
    with redis.Redis.from_url(server.url) as connection:
        for stream in keys.all_jobs:
            assert connection.xlen(stream) == 0
            assert connection.xpending(stream, "workers")["pending"] == 0
        assert not connection.exists(keys.dead)
        no_ttl = {key.decode() for key in connection.scan_iter(f"{keys.prefix}:*") if connection.ttl(key) < 0}
        assert no_ttl <= {*keys.all_jobs, keys.settings}


@pytest.mark.parametrize("is_async", [False, True], ids=["a step at a time", "a step ahead"])
def test_kill_9_of_a_worker_with_32_running_requests(server, queue, client, workers, uninterrupted, is_async):
    with workers("victim", "heir", async_scheduling=is_async) as local:
        # The other worker is stopped until the victim is full, so that the victim has 32 jobs to lose.
        os.kill(local.pid("heir"), signal.SIGSTOP)
        handles = client.submit_many({"prompt": prompt, "sampling": LONG} for prompt in PROMPTS)

        wait_until(lambda: held_by(handles, "victim", at_least=32), what="32 jobs that run")
        local.kill("victim")
        os.kill(local.pid("heir"), signal.SIGCONT)
        results = [handle.result(timeout=HANGS_S) for handle in handles]

    for handle, result, (token_ids, text) in zip(handles, results, uninterrupted(PROMPTS), strict=True):
        assert logged_token_ids(server, queue, handle.job_id) == result.token_ids == token_ids
        assert result.text == text
    attempts = Counter(result.timings["attempts"] for result in results)
    assert attempts[2] == 32 and set(attempts) == {1, 2}
    assert_nothing_is_left(server, queue)


def test_a_stream_goes_on_mid_sentence_when_its_worker_is_killed(client, workers, uninterrupted):
    with workers("victim") as first, workers("heir") as second:
        handle = client.submit(PROMPTS[0], sampling=LONG)
        chunks, holder = [], None
        for chunk in handle.stream():
            chunks.append(chunk)
            if chunk.position >= 20 and not holder:
                holder = name_of(handle.status().worker)
                (first if holder == "victim" else second).kill(holder)
    ((token_ids, text),) = uninterrupted(PROMPTS[:1])
    assert [token_id for chunk in chunks for token_id in chunk.token_ids] == token_ids
    assert "".join(chunk.text for chunk in chunks) == text
    assert handle.result().timings["attempts"] == 2


@pytest.mark.parametrize("is_async", [False, True], ids=["a step at a time", "a step ahead"])
def test_sigterm_hands_over_at_once_and_exits_clean(client, workers, uninterrupted, is_async):
    """The lease is an hour, so only an explicit hand-over lets the other worker go on."""
    with workers("leaving", "staying", lease_s=3600, async_scheduling=is_async) as local:
        os.kill(local.pid("staying"), signal.SIGSTOP)
        handles = client.submit_many({"prompt": prompt, "sampling": LONG} for prompt in PROMPTS[:8])
        # The server may have given the first job to a waiting read of the stopped worker.
        held = wait_until(lambda: held_by(handles, "leaving", at_least=7), what="7 jobs that run")
        os.kill(local.pid("staying"), signal.SIGCONT)
        assert local.terminate("leaving") == 0
        results = [handle.result(timeout=HANGS_S) for handle in handles]
    assert [(result.token_ids, result.text) for result in results] == uninterrupted(PROMPTS[:8])
    attempts = {result.job_id: result.timings["attempts"] for result in results}
    assert {attempts[job_id] for job_id in held} == {2}


def test_a_second_signal_leaves_without_a_hand_over(server, client, workers):
    with workers("impatient", drain_timeout_s=3600) as local:
        client.submit(PROMPTS[0], sampling=LONG)
        os.kill(server.pid, signal.SIGSTOP)  # so that the hand-over cannot end
        try:
            os.kill(local.pid("impatient"), signal.SIGTERM)
            wait_until(lambda: "draining" in local.log_text("impatient"), what="the start of the hand-over")
            assert local.terminate("impatient") == 130
        finally:
            os.kill(server.pid, signal.SIGCONT)


def test_a_server_killed_and_restarted_from_its_file(server, queue, workers, uninterrupted):
    with workers("w"), Client(server.url, queue=queue) as client:
        handles = client.submit_many({"prompt": prompt, "sampling": LONG} for prompt in PROMPTS[:8])
        wait_until(lambda: min(handle.status().position for handle in handles) > 3)
        os.kill(server.pid, signal.SIGKILL)
        server.stop()
        with durable_server(server.data_dir, port=server.port) as again:
            results = [handle.result(timeout=HANGS_S) for handle in handles]
            for handle, result in zip(handles, results, strict=True):
                assert logged_token_ids(again, queue, handle.job_id) == result.token_ids
    assert [(result.token_ids, result.text) for result in results] == uninterrupted(PROMPTS[:8])


@pytest.mark.parametrize("policy", ["allkeys-lru", "allkeys-random"])
def test_a_server_that_would_evict_is_refused(server, tiny_model, policy):
    with redis.Redis.from_url(server.url) as connection:
        connection.config_set("maxmemory-policy", policy)
    command = [sys.executable, "-m", "ingine.cli.main", "worker", "--redis-url", server.url]
    ended = subprocess.run(
        [*command, "--model", str(tiny_model), "--http-port", "-1"],
        capture_output=True,
        text=True,
        timeout=HANGS_S,
    )
    assert ended.returncode == 2
    assert "noeviction" in ended.stderr and "Traceback" not in ended.stderr
