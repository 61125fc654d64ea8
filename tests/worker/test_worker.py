"""One worker, a real server, a tiny real model: what a producer without a library gets for its XADD."""

import asyncio
import json
from collections import Counter
from functools import partial

import msgpack
import pytest

from ingine.contract.events import TokensEvent, decode_event, encode_event
from ingine.contract.jobs import Job, encode_job
from ingine.contract.keys import Priority
from ingine.contract.record import JobStatus
from ingine.engine.request import EngineRequest
from ingine.errors import ErrorCode
from ingine.sampling_params import SamplingParams
from ingine.worker.control import INTERVAL_S
from ingine.worker.heartbeat import Heartbeat
from ingine.worker.intake import SWEEP_INTERVAL_S
from tests.waiting import HANGS_S, wait_until_async
from tests.worker.conftest import Harness

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
ENDLESS = SamplingParams(temperature=0, max_tokens=450, ignore_eos=True)


def alone(engine, job: Job) -> tuple[list[int], str]:
    """Run a job on the engine without Redis. Returns token ids and text."""
    if job.messages:
        prompt = engine.tokenizer.encode_chat([m.model_dump() for m in job.messages])
    else:
        prompt = list(job.prompt) if isinstance(job.prompt, tuple) else engine.tokenizer.encode(job.prompt)
    engine.add(EngineRequest("alone", prompt, job.sampling))
    token_ids, text = [], ""
    while engine.has_unfinished:
        for output in engine.step():
            token_ids += output.token_ids
            text += output.text + output.final_text
    return token_ids, text


async def test_what_comes_out_is_what_the_engine_makes(harness, tiny_engine):
    worker = await harness()
    jobs = [
        Job(id="text", prompt="Hello, ", sampling=GREEDY),
        Job(id="ids", prompt=(72, 101, 108), sampling=GREEDY),
        Job(id="chat", messages=[{"role": "user", "content": "Hi"}], sampling=GREEDY),
        Job(id="dice", prompt="Once", sampling=SamplingParams(seed=7, max_tokens=24, ignore_eos=True)),
    ]
    for job in jobs:
        await worker.push(job)
    for job in jobs:
        token_ids, text = alone(tiny_engine(), job)
        events = await worker.events(job.id)
        assert [t for event in events[:-1] for t in event.token_ids] == token_ids
        assert "".join(event.text for event in events) == text
        end = events[-1]
        assert (end.status, end.finish_reason) == (JobStatus.FINISHED, "length")
        assert end.usage["num_output_tokens"] == 24
        assert end.timings["attempts"] == 1 and end.timings["total_ms"] >= end.timings["first_token_ms"] > 0


async def test_metadata_and_reply_come_back(harness):
    worker = await harness()
    await worker.push(Job(id="a", prompt="x", sampling=GREEDY, metadata={"row": 7}, reply_to="me"))
    end = await worker.end("a")
    assert end.metadata == {"row": 7}
    ((_, fields),) = await worker.redis.xrange(worker.keys.replies("me"))
    assert decode_event(fields[b"event"]) == end


async def test_a_job_with_stream_off_publishes_only_its_end(harness):
    worker = await harness()
    async with worker.redis.pubsub() as pubsub:
        await pubsub.ssubscribe(worker.keys.channel("quiet"))
        await worker.push(Job(id="quiet", prompt="x", sampling=GREEDY, stream=False))
        await worker.end("quiet")
        message = await wait_until_async(
            lambda: pubsub.get_message(ignore_subscribe_messages=True, timeout=1), what="a message"
        )
    assert decode_event(message["data"]).status is JobStatus.FINISHED


def raw(**fields) -> bytes:
    return msgpack.packb({"id": "bad", "prompt": "x"} | fields)


ADDRESSED = {
    "unknown field": (raw(promt="x"), ErrorCode.UNKNOWN_FIELD, "promt"),
    "unknown sampling field": (raw(sampling={"temprature": 1}), ErrorCode.UNKNOWN_FIELD, "temprature"),
    "wrong type": (raw(prompt=5), ErrorCode.INVALID_TYPE, "prompt"),
    "wrong type inside": (raw(sampling={"max_tokens": "9"}), ErrorCode.INVALID_TYPE, "max_tokens"),
    "no input": (msgpack.packb({"id": "bad"}), ErrorCode.INVALID_SHAPE, "prompt"),
    "two inputs": (raw(messages=[{"role": "user", "content": "x"}]), ErrorCode.INVALID_SHAPE, "messages"),
    "empty text": (raw(prompt=""), ErrorCode.EMPTY_PROMPT, "empty"),
    "no token ids": (raw(prompt=[]), ErrorCode.EMPTY_PROMPT, "no tokens"),
    "empty chat": (raw(prompt=None, messages=[]), ErrorCode.INVALID_MESSAGES, "message"),
    "too long": (raw(prompt="x" * 600), ErrorCode.PROMPT_TOO_LONG, "512"),
    "token id out of range": (raw(prompt=[1, 100_000]), ErrorCode.INVALID_TOKEN_ID, "100000"),
    "negative token id": (raw(prompt=[1, -1]), ErrorCode.INVALID_TOKEN_ID, "prompt"),
    "unknown model": (raw(model="gpt-5"), ErrorCode.UNKNOWN_MODEL, "tiny"),
    "out of range": (raw(sampling={"top_p": 1.5}), ErrorCode.INVALID_PARAMETER, "top_p"),
    "not a number": (raw(sampling={"temperature": float("nan")}), ErrorCode.INVALID_PARAMETER, "temperature"),
    "min over max": (
        raw(sampling={"min_tokens": 9, "max_tokens": 2}),
        ErrorCode.INVALID_PARAMETER,
        "min_tokens",
    ),
    "bias for no token": (raw(sampling={"logit_bias": {9999: 1.0}}), ErrorCode.INVALID_PARAMETER, "9999"),
    "other version": (raw(v=2), ErrorCode.UNSUPPORTED_VERSION, "version"),
    "nested metadata": (
        raw(metadata={"a": [[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]}),
        ErrorCode.NESTED_TOO_DEEP,
        "16",
    ),
    "huge metadata": (raw(metadata={"a": "x" * 20_000}), ErrorCode.INVALID_SHAPE, "metadata"),
}


@pytest.mark.parametrize("name", ADDRESSED)
async def test_bad_input_with_an_id_ends_in_a_clear_error(harness, name):
    payload, code, word = ADDRESSED[name]
    worker = await harness()
    await worker.push(payload)
    await worker.push(Job(id="good", prompt="x", sampling=GREEDY))
    end = await worker.end("bad")
    assert (end.status, end.error["code"], end.finish_reason) == (JobStatus.FAILED, code, "error")
    assert word in end.error["message"]
    assert (await worker.end("good")).status is JobStatus.FINISHED, "the worker goes on"


DEAD = {
    "not msgpack": (b"\xc1", ErrorCode.NOT_MSGPACK),
    "text": (b'{"id": "a"}', ErrorCode.NOT_MSGPACK),
    "cut off": (raw()[:-1], ErrorCode.NOT_MSGPACK),
    "empty": (b"", ErrorCode.NOT_MSGPACK),
    "a list": (msgpack.packb([1, 2]), ErrorCode.INVALID_SHAPE),
    "no id": (msgpack.packb({"prompt": "x"}), ErrorCode.INVALID_SHAPE),
    "impossible id": (msgpack.packb({"id": "a b", "prompt": "x"}), ErrorCode.INVALID_PARAMETER),
    "id of another type": (msgpack.packb({"id": 7, "prompt": "x"}), ErrorCode.INVALID_TYPE),
    "nested to exhaust the stack": (b"\x91" * 100_000, ErrorCode.NESTED_TOO_DEEP),
    "an array that claims 4 G": (b"\xdd\xff\xff\xff\xff", ErrorCode.NOT_MSGPACK),
    "unhashable key": (b"\x81\x90\x01", ErrorCode.NOT_MSGPACK),
    "over the limit": (raw(prompt="x" * 5000), ErrorCode.JOB_TOO_LARGE),
}


@pytest.mark.parametrize("name", DEAD)
async def test_bad_input_without_an_address_is_buried_with_its_bytes(harness, name):
    payload, code = DEAD[name]
    worker = await harness(max_job_bytes=4096 if code is ErrorCode.JOB_TOO_LARGE else None)
    await worker.push(payload)
    await worker.push(Job(id="good", prompt="x", sampling=GREEDY))
    assert (await worker.end("good")).status is JobStatus.FINISHED, "the worker goes on"
    (dead,) = await worker.dead_letters()
    assert (dead[b"job"], dead[b"code"].decode()) == (payload, code)
    assert dead[b"reason"]
    assert await worker.redis.xlen(worker.keys.jobs("normal")) == 0


async def test_an_entry_without_a_job_is_buried_with_the_fields_that_it_has(harness):
    """Producers of other queues push such entries: taskiq's tasks are in a field `data`."""
    worker = await harness()
    await worker.redis.xadd(worker.keys.jobs("normal"), {"data": b"\x80\x04.", "task": "generate"})
    await worker.push(Job(id="good", prompt="x", sampling=GREEDY))
    assert (await worker.end("good")).status is JobStatus.FINISHED, "the worker goes on"
    (dead,) = await worker.dead_letters()
    assert dead[b"code"].decode() == ErrorCode.INVALID_SHAPE
    assert (
        dead[b"reason"]
        .decode()
        .endswith("the entry's field `job`, in msgpack; this entry has `data`, `task`")
    )
    assert msgpack.unpackb(dead[b"job"], raw=True) == {b"data": b"\x80\x04.", b"task": b"generate"}


async def test_a_duplicate_id_is_buried_and_the_first_goes_on(harness):
    worker = await harness()
    await worker.push(Job(id="a", prompt="x", sampling=GREEDY))
    await worker.push(Job(id="a", prompt="y", sampling=GREEDY))
    assert (await worker.end("a")).status is JobStatus.FINISHED
    (dead,) = await wait_until_async(worker.dead_letters, what="a dead letter")
    assert dead[b"code"] == b"duplicate_id"


async def test_a_chat_for_a_model_without_a_template(harness, tmp_path):
    from ingine.engine.config import EngineConfig
    from ingine.engine.engine import Engine
    from tests.tiny_models import make_tiny_model

    model = make_tiny_model(tmp_path, chat_template=None)
    worker = await harness(Engine(EngineConfig(model=str(model), dtype="float32", kv_cache_bytes=4 << 20)))
    await worker.push(Job(id="a", messages=[{"role": "user", "content": "x"}]))
    assert (await worker.end("a")).error["code"] == ErrorCode.NO_CHAT_TEMPLATE


async def test_a_deadline_that_passed_in_the_queue(harness):
    worker = await harness()
    await wait_until_async(lambda: worker.redis.exists(worker.keys.workers), what="the worker's start")
    # An entry's id is its time of submission, by the server's clock: this one is from 2020.
    await worker.redis.execute_command(
        "XADD", worker.keys.jobs("high"), "1600000000000-0", "job",
        encode_job(Job(id="late", prompt="x", deadline_ms=60_000)),
    )  # fmt: skip
    end = await worker.end("late")
    assert (end.status, end.error["code"], end.position) == (
        JobStatus.EXPIRED,
        ErrorCode.DEADLINE_EXCEEDED,
        0,
    )


async def test_a_deadline_that_passes_while_it_runs(harness):
    worker = await harness()
    await worker.push(Job(id="a", prompt="x", sampling=ENDLESS, deadline_ms=400))
    end = await worker.end("a")
    assert end.status is JobStatus.EXPIRED
    assert end.usage["num_output_tokens"] == end.position


async def ask_to_cancel(worker, job_id: str, *, nudge: bool = True) -> None:
    await worker.redis.hset(worker.keys.job(job_id), "cancel", 1)
    if nudge:
        await worker.redis.spublish(
            worker.keys.control, msgpack.packb({"command": "cancel", "job_id": job_id})
        )


async def test_cancel_while_running(harness):
    """The flag alone suffices: the lease is long, so the answer to the next step reports it."""
    worker = await harness(lease_s=600)
    await worker.push(Job(id="a", prompt="x", sampling=ENDLESS))
    await wait_until_async(lambda: worker.position("a"), what="the first token")
    await ask_to_cancel(worker, "a", nudge=False)
    end = await worker.end("a")
    assert (end.status, end.finish_reason) == (JobStatus.CANCELLED, "abort")
    assert 0 < end.position < 450


@pytest.mark.parametrize("told_by", ["a nudge", "the lease's renewal"])
async def test_cancel_while_no_step_is_committed(harness, monkeypatch, told_by):
    """The server may be slow, or the sequence may wait in the engine."""
    nudge = told_by == "a nudge"
    worker, go_on = await harness(lease_s=600 if nudge else 0.5), asyncio.Event()
    append = worker.queue.append

    async def append_later(appends):
        await go_on.wait()
        return await append(appends)

    monkeypatch.setattr(worker.queue, "append", append_later)
    await worker.push(Job(id="a", prompt="x", sampling=ENDLESS))
    await wait_until_async(lambda: worker.worker._publisher.waiting_since, what="a step that waits")
    (job,) = worker.worker._jobs

    async def cancelled() -> bool:
        await ask_to_cancel(worker, "a", nudge=nudge)  # again: a nudge may come before there is a listener
        return job.ending is JobStatus.CANCELLED

    await wait_until_async(cancelled, what="the worker's knowing it")
    go_on.set()
    assert (await worker.end("a")).status is JobStatus.CANCELLED


async def test_cancel_while_waiting_in_the_engine(harness, tiny_engine):
    """Room for one sequence's KV only: the second is taken, and waits without a token."""
    bytes_per_block = 2 * 2 * 16 * 2 * 16 * 4  # layers, K and V, tokens, heads, head size, float32
    worker = await harness(tiny_engine(kv_cache_bytes=26 * bytes_per_block))
    long = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
    await worker.push(Job(id="a", prompt="x" * 300, sampling=long))
    await worker.push(Job(id="b", prompt="y" * 200, sampling=GREEDY))
    await wait_until_async(lambda: worker.redis.hget(worker.keys.job("b"), "began_at"), what="begin of b")
    await ask_to_cancel(worker, "b")
    assert (await worker.end("b")).status is JobStatus.CANCELLED
    assert (await worker.end("a")).status is JobStatus.FINISHED


async def test_a_forged_nudge_cancels_nothing(harness):
    worker = await harness()
    await worker.push(Job(id="a", prompt="x", sampling=ENDLESS))
    await wait_until_async(lambda: worker.position("a"), what="tokens")
    forgeries = [{"command": "cancel", "job_id": "a"}, {"command": 5}, {"cmd": "x"}, [1], "x"]
    for forged in [*map(msgpack.packb, forgeries), b"\xc1"]:
        told = partial(worker.redis.spublish, worker.keys.control, forged)
        await wait_until_async(told, what="a listener")
    end = await worker.end("a")
    assert (end.status, end.position) == (JobStatus.FINISHED, 450)


async def test_a_flood_of_forged_nudges_makes_a_worker_look_a_few_times(harness, monkeypatch):
    worker, looks, clock = await harness(), Counter(), asyncio.get_running_loop().time
    owners = {"beat": worker.worker._partitions[0].heartbeat} | dict.fromkeys(
        ("claim_idle", "cancelled_among"), worker.queue
    )

    def counting(name: str, look):
        async def counted(*args):
            looks[name] += 1
            return await look(*args)

        return counted

    for name, owner in owners.items():
        monkeypatch.setattr(owner, name, counting(name, getattr(owner, name)))
    await worker.push(Job(id="a", prompt="x", sampling=ENDLESS))
    await wait_until_async(lambda: worker.position("a"), what="tokens")
    named = [{"command": command} for command in ("drain", "pause", "released")]
    forged = [msgpack.packb(nudge) for nudge in (*named, {"command": "cancel", "job_id": "a"})]
    await wait_until_async(partial(worker.redis.spublish, worker.keys.control, forged[0]), what="a listener")
    began = clock()
    looks.clear()
    for _ in range(20):
        pipe = worker.redis.pipeline(transaction=False)
        for message in forged * 50:
            pipe.spublish(worker.keys.control, message)
        await pipe.execute()
    end = await worker.end("a")
    assert (end.status, end.position) == (JobStatus.FINISHED, 450)
    assert not worker.running.done()
    most = 3 + (clock() - began) * (1 / INTERVAL_S + 1 / SWEEP_INTERVAL_S)
    assert max(looks.values()) <= most, looks


async def test_a_worker_drains_when_its_key_says_so(harness):
    worker = await harness()
    worker_id = worker.queue.worker_id
    await worker.redis.hset(worker.keys.settings, f"drain:{worker_id}", 1)
    await worker.redis.spublish(worker.keys.control, msgpack.packb({"command": "drain"}))
    await asyncio.wait_for(worker.running, HANGS_S)
    assert not await worker.redis.hexists(worker.keys.workers, worker_id)
    assert not await worker.redis.hexists(worker.keys.settings, f"drain:{worker_id}")


async def test_a_worker_that_is_told_to_drain_before_it_is_ready_leaves_nothing_behind(harness, monkeypatch):
    beat = Heartbeat.beat

    async def beat_and_be_drained(self: Heartbeat) -> None:
        await self._redis.hset(self._keys.settings, f"drain:{self._worker_id}", 1)
        await beat(self)

    async def wait_for_ever(*_) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(Heartbeat, "beat", beat_and_be_drained)
    monkeypatch.setattr("ingine.worker.startup._agree_on_model", wait_for_ever)
    worker = await harness()
    await asyncio.wait_for(worker.running, HANGS_S)
    assert not worker.worker._partitions[0].ready.is_set()
    assert not await worker.redis.hlen(worker.keys.workers)
    assert not await worker.redis.hexists(worker.keys.settings, f"drain:{worker.queue.worker_id}")


async def test_no_more_jobs_are_taken_than_the_engine_has_room_for(harness, tiny_engine):
    worker = await harness(tiny_engine(max_num_seqs=2))
    for number in range(6):
        await worker.push(Job(id=f"j{number}", prompt="x", sampling=ENDLESS))
    await wait_until_async(lambda: worker.position("j1"), what="tokens of the second job")
    assert await worker.num_held() == 2
    for number in range(6):
        await ask_to_cancel(worker, f"j{number}")


async def test_stop_hands_running_jobs_to_a_peer_mid_generation(harness, tiny_engine):
    first, other_engine = await harness(), tiny_engine()
    dice = ENDLESS.model_copy(update={"temperature": 1.0, "seed": 3})
    job = Job(id="a", prompt="Once upon a time", sampling=dice)
    await first.push(job)
    await wait_until_async(lambda: first.position("a"), what="the first token")
    second = await harness(other_engine)
    await first.stop()
    assert 0 < await first.position("a") < 450, "it was mid-generation"
    events = await second.events("a")
    assert events[-1].timings["attempts"] == 2
    token_ids, text = alone(tiny_engine(), job)
    assert [t for event in events[:-1] for t in event.token_ids] == token_ids
    assert "".join(event.text for event in events) == text
    assert await second.redis.hget(second.keys.job("a"), "deaths") == b"0"


async def leave_behind(
    worker: Harness, job: Job, log: list[TokensEvent], *, deaths: int = 0, number: int = 0
) -> None:
    """Write the state of a worker that died after `log`: the job's entry, its record and its log.

    number: counts the jobs that are left behind in a queue.
    """
    keys, position, entry = worker.keys, log[-1].position if log else 0, f"9999999999999-{number}"
    record = {"status": "running", "worker": "dead", "attempt": 1, "position": position, "deaths": deaths}
    async with worker.redis.pipeline(transaction=True) as pipe:
        for event in log:
            pipe.xadd(keys.tokens(job.id), {"event": encode_event(event)}, id=f"{event.position}-0")
        pipe.xadd(keys.jobs("normal"), {"job": encode_job(job)}, id=entry)
        pipe.hset(keys.job(job.id), mapping=record | {"entry": entry, "submitted_at": 1})
        await pipe.execute()


SAMPLINGS = {
    "greedy": SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, seed=5),
    "top_p": SamplingParams(temperature=1.3, top_p=0.9, seed=5, max_tokens=24, ignore_eos=True),
    "penalties": SamplingParams(
        max_tokens=24, seed=5, ignore_eos=True, repetition_penalty=1.3, frequency_penalty=0.7
    ),
    "stop strings": SamplingParams(max_tokens=24, seed=5, min_tokens=20, stop=["e", "th"]),
    "logprobs": SamplingParams(max_tokens=24, seed=5, logprobs=2, logit_bias={65: 5.0}),
}


@pytest.mark.parametrize("resume_at", [1, 5, 11, 23])
@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
async def test_a_job_resumes_from_its_log_as_if_nothing_had_happened(
    harness, step_by_step, sampling, resume_at
):
    worker = await harness()
    job = Job(id="whole", prompt="Tell me", sampling=sampling)
    await worker.push(job)
    whole = await worker.events("whole")

    log = [event for event in whole[:-1] if event.position <= resume_at]
    await leave_behind(worker, job.model_copy(update={"id": "again"}), log)
    resumed = await worker.events("again")
    assert resumed[:-1] == approximately(whole[:-1])
    assert (resumed[-1].text, resumed[-1].finish_reason) == (whole[-1].text, whole[-1].finish_reason)


def approximately(events: list[TokensEvent]) -> list[TokensEvent]:
    """Equal but for the last bits of logprobs: another batch is another order of additions."""
    for event in events:
        for logprobs in event.logprobs or ():
            logprobs["logprob"] = pytest.approx(logprobs["logprob"], abs=1e-4)
            logprobs["top"] = [
                [token_id, pytest.approx(value, abs=1e-4)] for token_id, value in logprobs["top"]
            ]
    return events


async def test_a_job_that_died_between_its_last_token_and_its_end_is_only_finished(harness):
    worker = await harness()
    job = Job(id="whole", prompt="x", sampling=GREEDY)
    await worker.push(job)
    whole = await worker.events("whole")
    await leave_behind(worker, job.model_copy(update={"id": "again"}), whole[:-1])
    again = await worker.events("again")
    assert again[:-1] == whole[:-1]
    assert again[-1].finish_reason == "length"


async def test_a_log_that_lost_its_tail_is_written_again(harness, step_by_step):
    """A server that crashed before syncing its last second has an older record and log."""
    worker = await harness()
    await worker.push(Job(id="a", prompt="x", sampling=ENDLESS))
    await wait_until_async(lambda: worker.position("a"), what="the first token")
    lost = await worker.redis.eval(
        """
        local entries = redis.call('XRANGE', KEYS[2], '-', '+')
        redis.call('DEL', KEYS[2])
        local kept = math.floor(#entries / 2)
        for i = 1, kept do redis.call('XADD', KEYS[2], entries[i][1], unpack(entries[i][2])) end
        redis.call('HSET', KEYS[1], 'position', kept)
        return #entries - kept
        """,
        2,
        worker.keys.job("a"),
        worker.keys.tokens("a"),
    )
    assert lost > 0
    events = await worker.events("a")  # which checks that no position is missing
    assert events[-1].status is JobStatus.FINISHED and events[-1].position == 450


async def test_a_job_that_kills_its_engine_every_time_ends_as_failed(harness, tiny_engine, monkeypatch):
    engine = tiny_engine()
    forward = engine._runner.forward

    def forward_or_break(batch):
        if any(seq.seq_id.startswith("poison") for seq in batch.seqs):
            raise RuntimeError("poisoned")
        return forward(batch)

    monkeypatch.setattr(engine._runner, "forward", forward_or_break)
    worker = await harness(engine)
    await worker.push(Job(id="poison", prompt="x", sampling=GREEDY))
    end = await worker.end("poison")
    assert (end.status, end.error["code"]) == (JobStatus.FAILED, ErrorCode.WORKER_LOST)
    assert end.timings["attempts"] == 4
    await worker.push(Job(id="good", prompt="x", sampling=GREEDY))
    assert (await worker.end("good")).status is JobStatus.FINISHED


async def test_logs_never_contain_prompts_or_outputs(harness, caplog):
    worker = await harness()
    with caplog.at_level("DEBUG"):
        await worker.push(Job(id="a", prompt="SECRETPROMPT", sampling=GREEDY))
        text = await worker.text("a")
    logged = "\n".join(json.dumps(record.__dict__, default=str) for record in caplog.records)
    assert "job begun" in logged
    assert "SECRETPROMPT" not in logged and text not in logged


async def test_priorities_decide_who_runs_first(harness, tiny_engine):
    worker = await harness(tiny_engine(max_num_seqs=1))
    await worker.push(Job(id="first", prompt="x", sampling=ENDLESS))
    await wait_until_async(lambda: worker.position("first"), what="the first token")
    await worker.push(Job(id="low", prompt="x", sampling=GREEDY), Priority.LOW)
    await worker.push(Job(id="high", prompt="x", sampling=GREEDY), Priority.HIGH)
    await ask_to_cancel(worker, "first")
    await worker.end("low")
    began = [int(await worker.redis.hget(worker.keys.job(name), "began_at")) for name in ("high", "low")]
    assert began == sorted(began)
