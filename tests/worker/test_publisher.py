"""What the publisher does when log, engine and consumers do not agree about how far a job is."""

import pytest

from ingine.keys import Priority
from ingine.outputs import FinishReason, SeqOutput
from ingine.wire import Job, JobStatus
from tests.waiting import wait_until_async
from tests.worker.test_worker import ENDLESS, GREEDY
from worker.entries import Begun, Entry
from worker.jobs import RunningJob
from worker.publisher import terminal_event

LOSE_TAIL = """
local entries = redis.call('XRANGE', KEYS[2], '-', '+')
redis.call('DEL', KEYS[2])
local kept = math.floor(#entries / 2)
for i = 1, kept do redis.call('XADD', KEYS[2], entries[i][1], unpack(entries[i][2])) end
redis.call('HSET', KEYS[1], 'position', kept)
return kept
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
