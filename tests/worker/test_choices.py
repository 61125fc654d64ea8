"""Jobs of several choices in a worker: log, resumption, cancel, deadline, and a server that loses events."""

import msgpack
import pytest

from ingine.contract.choices import ChoicePositions
from ingine.contract.events import TokensEvent, decode_log
from ingine.contract.jobs import Job, encode_job
from ingine.contract.record import JobStatus
from ingine.errors import ErrorCode
from ingine.sampling_params import SamplingParams
from tests.waiting import wait_until_async
from tests.worker.test_publisher import LOSE_TAIL
from tests.worker.test_worker import alone, ask_to_cancel, leave_behind

N = 3
DICE = SamplingParams(temperature=1.5, seed=11, max_tokens=16, ignore_eos=True, n=N)
UNEVEN = SamplingParams(temperature=1.5, seed=4, min_tokens=1, stop_token_ids=tuple(range(100)), n=N)
ENDLESS = SamplingParams(temperature=0, max_tokens=450, ignore_eos=True, n=N)


def lone_choices(engine, job: Job) -> list[tuple[list[int], str]]:
    """What lone jobs with the seeds of the choices generate."""
    return [
        alone(engine, job.model_copy(update={"sampling": job.sampling.model_copy(update=update)}))
        for update in ({"n": 1, "seed": (job.sampling.seed or 0) + index} for index in range(job.sampling.n))
    ]


async def choices(worker, job_id: str) -> list[tuple[list[int], str, str]]:
    """Token ids, text and finish reason of each choice. Checks the log as a reader does."""
    *events, end = await worker.events(job_id)
    assert end.choices is not None, end
    entries = await worker.redis.xrange(worker.keys.tokens(job_id))
    decode_log(job_id, 0, entries, choices=ChoicePositions(from_start=True))
    found = []
    for index, ending in enumerate(end.choices):
        of = [event for event in events if event.index == index]
        token_ids = [token_id for event in of for token_id in event.token_ids]
        assert ending["index"] == index and ending["num_output_tokens"] == len(token_ids)
        if of and of[-1].finish_reason:
            assert (of[-1].finish_reason, of[-1].stop_reason) == (
                ending["finish_reason"],
                ending.get("stop_reason"),
            )
            assert "text" not in ending
        text = "".join(event.text for event in of) + ending.get("text", "")
        found.append((token_ids, text, ending["finish_reason"]))
    assert end.text == "" and end.usage["num_output_tokens"] == sum(len(ids) for ids, _, _ in found)
    return found


@pytest.mark.parametrize("sampling", [DICE, UNEVEN], ids=["dice", "uneven"])
@pytest.mark.parametrize("more", [{}, {"max_num_seqs": 2}], ids=["together", "in turns"])
async def test_each_choice_is_what_a_lone_job_generates(harness, tiny_engine, sampling, more):
    worker = await harness(tiny_engine(**more))
    job = Job(id="a", prompt="Once upon a time", sampling=sampling)
    await worker.push(job)
    found = await choices(worker, "a")
    assert [(ids, text) for ids, text, _ in found] == lone_choices(tiny_engine(), job)
    end = await worker.end("a")
    assert (end.status, end.finish_reason) == (JobStatus.FINISHED, found[0][2])
    assert end.usage["num_prompt_tokens"] == len("Once upon a time") and end.usage["num_cached_tokens"] == 0
    assert worker.worker._metrics.output_tokens._value.get() == end.position
    assert worker.worker._metrics.prompt_tokens._value.get() == len("Once upon a time")
    assert worker.worker._jobs.num_places == 0


@pytest.mark.parametrize("share", [0.3, 0.8, 1.0])
async def test_a_job_is_resumed_from_its_log(harness, tiny_engine, share):
    """With all tokens in the log, only the terminal event is missing."""
    worker = await harness()
    job = Job(id="a", prompt="Once", sampling=UNEVEN)
    await worker.push(job)
    right, (*events, end) = await choices(worker, "a"), await worker.events("a")
    again = job.model_copy(update={"id": "b", "sampling": job.sampling})
    await leave_behind(worker, again, events[: int(share * len(events))])
    assert await choices(worker, "b") == right
    resumed = await worker.end("b")
    assert (resumed.finish_reason, resumed.choices) == (end.finish_reason, end.choices)
    assert resumed.timings["attempts"] == 2


async def test_a_choice_that_ended_stays_ended(harness):
    worker = await harness()
    job = Job(
        id="a", prompt="Once", sampling=SamplingParams(temperature=0, max_tokens=9, ignore_eos=True, n=2)
    )
    first = TokensEvent(2, [72, 73], "HI", None, 0, 2, "stop", 73)
    await leave_behind(worker, job, [first])
    found = await choices(worker, "a")
    assert found[0] == ([72, 73], "HI", "stop") and len(found[1][0]) == 9
    assert (await worker.end("a")).choices[0]["stop_reason"] == 73


@pytest.mark.parametrize(
    "event",
    [
        TokensEvent(1, [72], "H"),
        TokensEvent(1, [72], "H", None, N, 1),
        TokensEvent(1, [72], "H", None, 0, 2),
    ],
    ids=["no choice", "no such choice", "a gap"],
)
async def test_a_log_of_other_choices_fails_the_job(harness, event):
    worker = await harness()
    await leave_behind(worker, Job(id="a", prompt="Once", sampling=DICE), [event])
    await wait_until_async(lambda: worker._status("a"), what="the end")
    assert (await worker.redis.hget(worker.keys.job("a"), "status")) == b"failed"


@pytest.mark.parametrize("n", [0, -1, 10**6, 17, 1.5, "2", True], ids=repr)
async def test_a_wrong_number_of_choices_ends_the_job_with_a_code(harness, tiny_engine, n):
    worker = await harness(tiny_engine(max_choices=16))
    await worker.push(msgpack.packb({"id": "a", "prompt": "x", "sampling": {"n": n}}))
    await worker.push(Job(id="good", prompt="x", sampling=DICE))
    end = await worker.end("a")
    code = ErrorCode.INVALID_TYPE if type(n) is not int else ErrorCode.INVALID_PARAMETER
    assert (end.status, end.error["code"]) == (JobStatus.FAILED, code)
    assert "n" in end.error["message"]
    assert (await worker.end("good")).status is JobStatus.FINISHED


@pytest.mark.parametrize("share", [0.5, 1.0])
async def test_a_lower_limit_of_choices_ends_no_job_that_has_tokens(harness, tiny_engine, share):
    job = Job(id="whole", prompt="Once", sampling=DICE)
    worker = await harness()
    await worker.push(job)
    right, events = await choices(worker, "whole"), (await worker.events("whole"))[:-1]
    await worker.stop()
    worker = await harness(tiny_engine(max_choices=N - 1))
    await leave_behind(worker, job.model_copy(update={"id": "rest"}), events[: int(share * len(events))])
    assert await choices(worker, "rest") == right


async def test_the_bare_wire(harness, tiny_engine):
    worker = await harness()
    sampling = {"n": 2, "temperature": 1.5, "seed": 3, "max_tokens": 8, "ignore_eos": True}
    job = {"v": 1, "id": "a", "prompt": "hi", "sampling": sampling}
    await worker.redis.xadd(worker.keys.jobs("normal"), {"job": msgpack.packb(job)})
    found = await choices(worker, "a")
    whole = Job(id="a", prompt="hi", sampling=SamplingParams(**sampling))
    assert [(ids, text) for ids, text, _ in found] == lone_choices(tiny_engine(), whole)
    assert msgpack.unpackb(encode_job(whole))["sampling"]["n"] == 2


async def test_a_cancel_ends_all_choices(harness):
    worker = await harness()
    await worker.push(Job(id="a", prompt="x", sampling=ENDLESS))
    await wait_until_async(lambda: worker.position("a"), what="tokens")
    await ask_to_cancel(worker, "a")
    found = await choices(worker, "a")
    end = await worker.end("a")
    assert (end.status, end.finish_reason) == (JobStatus.CANCELLED, "abort")
    assert {reason for _, _, reason in found} == {"abort"}
    await wait_until_async(lambda: not worker.engine.has_unfinished, what="the abort")


async def test_a_deadline_ends_all_choices(harness):
    worker = await harness()
    await worker.push(Job(id="a", prompt="x", sampling=ENDLESS, deadline_ms=400))
    end = await worker.end("a")
    if end.position:  # else it had passed before the job began
        found = await choices(worker, "a")
        assert {reason for _, _, reason in found} == {"abort"}
    assert end.status is JobStatus.EXPIRED
    await wait_until_async(lambda: not worker.engine.has_unfinished, what="the abort")


async def test_a_worker_that_stops_hands_all_choices_over(harness, tiny_engine):
    first = await harness()
    job = Job(id="a", prompt="x", sampling=ENDLESS)
    await first.push(job)
    await wait_until_async(lambda: first.position("a"), what="tokens")
    await first.stop()
    second = await harness()
    found = await choices(second, "a")
    assert [(ids, text) for ids, text, _ in found] == lone_choices(tiny_engine(), job)
    assert (await second.end("a")).timings["attempts"] == 2


async def test_events_that_the_server_lost_are_written_again(harness, tiny_engine, monkeypatch):
    worker = await harness()
    finish, kept = worker.queue.finish, []

    async def finish_after_a_loss(finishing):
        if not kept:
            names = worker.keys.job("a"), worker.keys.tokens("a")
            kept.append(await worker.redis.eval(LOSE_TAIL, 2, *names))
        return await finish(finishing)

    monkeypatch.setattr(worker.queue, "finish", finish_after_a_loss)
    job = Job(id="a", prompt="x", sampling=DICE)
    await worker.push(job)
    found = await choices(worker, "a")
    assert 0 < kept[0] < 48
    assert [(ids, text) for ids, text, _ in found] == lone_choices(tiny_engine(), job)


async def test_a_reply_that_is_lost_does_not_commit_twice(harness, tiny_engine, monkeypatch):
    """The call is made again, and its answer to each event is the position after the last of them."""
    worker = await harness()
    append, answers = worker.queue.append, []

    async def append_twice(appends):
        await append(appends)
        answers.append(await append(appends))
        return answers[-1]

    monkeypatch.setattr(worker.queue, "append", append_twice)
    job = Job(id="a", prompt="x", sampling=DICE)
    await worker.push(job)
    found = await choices(worker, "a")
    assert [(ids, text) for ids, text, _ in found] == lone_choices(tiny_engine(), job)
    assert any(len(answer) > 1 and len(set(answer)) == 1 for answer in answers)
    assert worker.worker._metrics.log_rollbacks._value.get() == 0


async def test_all_events_of_a_step_are_appended_in_one_call(harness, monkeypatch):
    worker = await harness()
    append, sizes = worker.queue.append, []

    async def counted(appends):
        sizes.append(len(appends))
        return await append(appends)

    monkeypatch.setattr(worker.queue, "append", counted)
    await worker.push(Job(id="a", prompt="x", sampling=DICE))
    events = await worker.events("a")
    assert sum(sizes) == len(events) - 1 and len(sizes) <= 2 + 16


async def test_a_job_counts_with_all_its_choices_for_room_and_shares(harness):
    worker = await harness()
    await worker.push(Job(id="a", prompt="xyz", sampling=ENDLESS))
    await wait_until_async(lambda: worker.position("a"), what="tokens")
    [job] = worker.worker._jobs
    assert job.num_tokens == 3 + N * 450
    assert worker.worker._jobs.num_places == N
    await ask_to_cancel(worker, "a")
    await worker.end("a")
