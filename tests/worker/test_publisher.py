"""The publisher when log, engine and consumers disagree about a job's position."""

from types import SimpleNamespace

import pytest

from ingine.contract.calls.begin import Begun
from ingine.contract.calls.running import Refusal
from ingine.contract.entries import Entry
from ingine.contract.jobs import Job
from ingine.contract.keys import Priority
from ingine.contract.record import JobStatus
from ingine.engine.outputs import FinishReason, SeqOutput
from ingine.worker.finisher import Finisher
from ingine.worker.jobs import JobTable, RunningJob
from ingine.worker.metrics import Metrics
from ingine.worker.publisher import Publisher
from ingine.worker.terminal_events import terminal_event
from tests.waiting import wait_until_async
from tests.worker.test_worker import ENDLESS, GREEDY, alone, ask_to_cancel, leave_behind

LOSE_TAIL = """
local entries = redis.call('XRANGE', KEYS[2], '-', '+')
redis.call('DEL', KEYS[2])
local kept = math.floor(#entries / 2)
for i = 1, kept do redis.call('XADD', KEYS[2], entries[i][1], unpack(entries[i][2])) end
local position = tonumber(string.match(entries[kept][1], '^%d+'))
redis.call('HSET', KEYS[1], 'position', position)
return position
"""


async def test_a_log_that_is_shorter_at_the_end_is_written_again_before_the_end(harness, monkeypatch):
    worker = await harness()
    finish, kept = worker.queue.finish, []

    async def finish_after_a_loss(finishing):
        if not kept:
            names = worker.keys.job("a"), worker.keys.tokens("a")
            kept.append(await worker.redis.eval(LOSE_TAIL, 2, *names))
        return await finish(finishing)

    monkeypatch.setattr(worker.queue, "finish", finish_after_a_loss)
    await worker.push(Job(id="a", prompt="x", sampling=GREEDY))
    events = await worker.events("a")  # which checks that no position is missing
    assert 0 < kept[0] < 24
    assert (events[-1].position, events[-1].usage["num_output_tokens"]) == (24, 24)


async def test_tokens_that_the_engine_left_out_are_never_passed_over(harness, tiny_engine, monkeypatch):
    """The log is not behind, so nothing can be sent again: the job's next attempt makes them."""
    engine, lost = tiny_engine(), []
    step = engine.step

    def step_and_lose(**options):
        outputs = step(**options)
        if not lost and outputs and outputs[0].position == 5:
            lost.append(outputs.pop(0))
        return outputs

    engine.step = step_and_lose
    worker = await harness(engine)
    await worker.push(Job(id="a", prompt="x", sampling=ENDLESS))
    end = await worker.end("a")
    assert (end.position, end.timings["attempts"]) == (450, 2)
    assert await worker.redis.hget(worker.keys.job("a"), "deaths") == b"1"
    assert worker.worker._metrics.log_rollbacks._value.get() == 0


@pytest.mark.parametrize(
    ("ending", "text"), [(JobStatus.CANCELLED, ""), (JobStatus.EXPIRED, "held"), (None, "held")]
)
def test_a_cancelled_job_ends_without_text_that_belongs_to_tokens_it_may_lack(ending, text):
    entry, begun = Entry(Priority.NORMAL, "1-0", b""), Begun("run", attempt=1)
    job = RunningJob(None, Job(id="a", prompt="x"), entry, begun, position=1)
    job.ending = ending
    reason = FinishReason.ABORT if ending else FinishReason.STOP
    output = SeqOutput("a#1", 2, [], "", 3, 0, finish_reason=reason, final_text="held")
    event = terminal_event(job, output)
    assert (event.status, event.text) == (ending or JobStatus.FINISHED, text)


async def test_nothing_waits_for_the_server_once_a_step_is_committed():
    """A part that waits makes `/readyz` report that the worker is not ready."""
    metrics = Metrics()
    publisher = Publisher(JobTable(), Finisher(metrics), metrics, abort=lambda seq_id: None)
    await publisher.commit([])
    assert publisher.waiting_since is None


def test_a_job_that_somebody_else_holds_is_let_go_once():
    """It may be told by each lane and by the leases."""
    jobs, metrics, aborted = JobTable(), Metrics(), []
    publisher = Publisher(jobs, Finisher(metrics), metrics, aborted.append)
    entry, queue = Entry(Priority.NORMAL, "1-0", b""), SimpleNamespace(weights={})
    job = RunningJob(queue, Job(id="a", prompt="x"), entry, Begun("run", attempt=1), position=1)
    jobs.add(job)
    for _ in range(2):
        publisher.drop(job)
    assert aborted == ["a#1"] and not len(jobs)
    assert metrics.fenced_writes._value.get() == 1


@pytest.mark.parametrize("ending", [None, JobStatus.CANCELLED, JobStatus.EXPIRED])
async def test_an_abort_ends_a_job_only_if_the_job_was_to_end(ending):
    """The worker also aborts the sequences of jobs that it is about to release: it cannot commit them."""
    finished = []

    async def finish(finishing):
        finished.append(finishing.event.status)
        return finishing.event.position

    jobs, metrics, aborted = JobTable(), Metrics(), []
    publisher = Publisher(jobs, Finisher(metrics), metrics, aborted.append)
    entry, queue = Entry(Priority.NORMAL, "1-0", b""), SimpleNamespace(weights={}, finish=finish)
    job = RunningJob(queue, Job(id="a", prompt="x"), entry, Begun("run", attempt=1), position=1)
    job.ending = ending
    jobs.add(job)
    await publisher.commit([SeqOutput("a#1", 1, [], "", 3, 0, finish_reason=FinishReason.ABORT)])
    assert finished == ([ending] if ending else [])
    assert list(jobs) == ([] if ending else [job]), "a job that has not ended is there to be released"


async def test_a_job_that_is_cancelled_is_appended_to_no_more(harness, monkeypatch):
    """The engine goes on with it until it has learned of that, and what it makes is dropped unsent."""
    worker = await harness()
    await worker.push(Job(id="a", prompt="x", sampling=ENDLESS))
    await wait_until_async(lambda: worker.position("a"), what="tokens")
    publisher, queue = worker.worker._publisher, worker.queue
    append, abort, answers, late = queue.append, publisher._abort, [], []

    async def noted(appends):
        answered = await append(appends)
        answers.extend(answered)
        return answered

    monkeypatch.setattr(queue, "append", noted)
    monkeypatch.setattr(publisher, "_abort", late.append)
    await ask_to_cancel(worker, "a", nudge=False)
    await wait_until_async(lambda: late, what="the cancel being seen")
    [seq] = worker.engine._scheduler.running
    before = seq.num_output_tokens
    await wait_until_async(lambda: seq.num_output_tokens > before + 5, what="steps after it")
    abort(late[0])
    assert (await worker.end("a")).status is JobStatus.CANCELLED
    assert answers.count(Refusal.CANCELLED) == 1


async def test_no_token_is_added_after_a_cancel_was_seen(harness, monkeypatch):
    """The log holds what it held; what the engine made until it learned of it is dropped."""
    worker = await harness()
    await worker.push(Job(id="a", prompt="x", sampling=ENDLESS))
    await wait_until_async(lambda: worker.position("a"), what="tokens")
    (job,) = worker.worker._jobs
    worker.worker._publisher.cancel(job)
    last_sent = job.sent._appends[-1].position
    end = await worker.end("a")
    assert end.status is JobStatus.CANCELLED and end.position <= last_sent


async def test_a_lease_that_ends_with_its_job_is_not_lost(harness, monkeypatch):
    """The job ends in Redis, its lease is asked for, and only then the answer comes that it has ended."""
    worker = await harness()
    finish, asked = worker.queue.finish, []

    async def finish_and_ask_for_the_lease(finishing):
        answer = await finish(finishing)
        (job,) = worker.worker._jobs
        asked.append(job.id)
        worker.worker._publisher.lease_answered(job, Refusal.STALE)
        return answer

    monkeypatch.setattr(worker.queue, "finish", finish_and_ask_for_the_lease)
    await worker.push(Job(id="a", prompt="x", sampling=GREEDY))
    assert (await worker.end("a")).status is JobStatus.FINISHED
    await wait_until_async(lambda: not len(worker.worker._jobs), what="the end here")
    assert asked == ["a"]
    assert worker.worker._metrics.fenced_writes._value.get() == 0


@pytest.mark.parametrize("is_resumed", [False, True], ids=["first attempt", "resumed"])
async def test_steps_that_wait_for_a_slow_server_are_one_event_with_all_that_they_made(
    harness, tiny_engine, monkeypatch, is_resumed
):
    """A resumed job is an exception: a consumer may have read some of what the server has lost."""
    worker = await harness()
    append, engine = worker.queue.append, worker.worker._engine

    async def append_once_the_engine_waits(appends):
        await wait_until_async(
            lambda: engine._credits._value == 0 or not worker.engine.has_unfinished, what="steps ahead"
        )
        return await append(appends)

    monkeypatch.setattr(worker.queue, "append", append_once_the_engine_waits)
    job = Job(id="a", prompt="x", sampling=GREEDY.model_copy(update={"logprobs": 2}))
    right = alone(tiny_engine(), job)
    if is_resumed:
        await leave_behind(worker, job, [])
    else:
        await worker.push(job)
    *events, end = await worker.events("a")  # which checks that no position is missing
    assert end.timings["attempts"] == 1 + is_resumed
    assert (max(len(event.token_ids) for event in events) > 1) is not is_resumed
    token_ids = [token_id for event in events for token_id in event.token_ids]
    text = "".join(event.text for event in events) + end.text
    assert (token_ids, text) == right
    assert [entry["token_id"] for event in events for entry in event.logprobs] == token_ids
