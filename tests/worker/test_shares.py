"""A tenant that floods starves nobody: in what the worker takes, and in what its engine runs."""

from functools import partial

from ingine.contract.calls.begin import Begun
from ingine.contract.entries import Entry
from ingine.contract.events import decode_event
from ingine.contract.jobs import Job, encode_job
from ingine.contract.keys import EVENT_FIELD, Priority
from ingine.engine.engine import Engine
from ingine.sampling_params import SamplingParams
from ingine.worker.jobs import JobTable, RunningJob
from ingine.worker.shares import SECONDS_PER_TOKEN, Shares
from tests.waiting import wait_until_async

WHOSE = ("t", Priority.NORMAL)
LONG = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)


class FakeQueue:
    def __init__(self):
        self.weights = {"gold": 4.0}


def held(jobs: JobTable, name: str, tenant: str, num_tokens: int, priority=Priority.NORMAL) -> RunningJob:
    begun = Begun("run", attempt=1, now=1_000, submitted_at=1_000)
    entry = Entry(priority, "1000-0", b"")
    job = RunningJob(
        FakeQueue(), Job(id=name, prompt="x", tenant=tenant), entry, begun, position=0, num_tokens=num_tokens
    )
    jobs.add(job)
    return job


def test_a_job_arrives_later_by_what_its_tenant_has_under_way():
    jobs = JobTable()
    first = held(jobs, "a", "flood", 100)
    second = held(jobs, "b", "flood", 100)
    other = held(jobs, "c", "small", 100)
    assert round(second.arrival - first.arrival, 1) == 100 * SECONDS_PER_TOKEN
    assert other.arrival < second.arrival
    third = held(jobs, "d", "flood", 100)
    assert round(third.arrival - first.arrival, 1) == 200 * SECONDS_PER_TOKEN


def test_weight_and_priority_are_taken_into_account():
    jobs = JobTable()
    first = held(jobs, "a", "gold", 400)
    assert round(held(jobs, "b", "gold", 1).arrival - first.arrival, 1) == 100 * SECONDS_PER_TOKEN
    urgent = held(jobs, "c", "gold", 1, Priority.HIGH)
    assert round(urgent.arrival - first.arrival, 1) == 0


def test_what_a_job_was_counted_for_is_given_back_when_it_ends():
    shares = Shares()
    assert shares.enter(WHOSE, 1000, 0.0, 1.0) == 0
    assert shares.enter(WHOSE, 500, 0.0, 1.0) == 1000 * SECONDS_PER_TOKEN
    shares.leave(WHOSE, 1000)
    later = 1e6  # so late that no earlier job of the tenant matters
    assert shares.enter(WHOSE, 100, later, 1.0) == later + 500 * SECONDS_PER_TOKEN
    shares.leave(WHOSE, 500)
    assert shares.enter(WHOSE, 1, 2 * later, 1.0) == 2 * later + 100 * SECONDS_PER_TOKEN


def test_a_tenants_own_jobs_keep_their_order_when_its_backlog_shrinks():
    shares = Shares()
    shares.enter(WHOSE, 1000, 0.0, 1.0)
    second = shares.enter(WHOSE, 1, 0.0, 1.0)
    shares.leave(WHOSE, 1000)
    assert shares.enter(WHOSE, 1, 0.0, 1.0) == second


def test_once_a_tenant_has_nothing_under_way_it_has_no_past():
    shares = Shares()
    for num_tokens in (100_000, 1):
        shares.enter(WHOSE, num_tokens, 0.0, 1.0)
    for num_tokens in (100_000, 1):
        shares.leave(WHOSE, num_tokens)
    assert not shares._shares
    assert shares.enter(WHOSE, 1, 5.0, 1.0) == 5.0


def test_a_job_that_leaves_the_worker_leaves_its_share_once():
    jobs = JobTable()
    first, second = held(jobs, "a", "t", 1000), held(jobs, "b", "t", 10)
    for _ in range(2):
        jobs.remove(first)
    (share,) = jobs._shares._shares.values()
    assert (share.num_jobs, share.num_tokens) == (1, 10)
    jobs.remove(second)
    assert not jobs._shares._shares


async def test_a_flood_does_not_keep_another_tenant_waiting(harness, tiny_engine):
    """Room for two at a time; the flood of one tenant is there first."""
    worker = await harness(tiny_engine(max_num_seqs=2))
    for number in range(10):
        await submit(worker, f"flood-{number}", "flood")
    await wait_until_async(lambda: worker.position("flood-1"), what="two of the flood run")
    await submit(worker, "small", "small")
    end = await worker.end("small")
    assert end.status == "finished"
    mine = await began_at(worker, "small")
    began = [await began_at(worker, f"flood-{number}") for number in range(10)]
    assert sum(1 for at in began if 0 < at < mine) <= 4
    for number in range(10):
        await worker.end(f"flood-{number}")


async def submit(worker, name: str, tenant: str, reply_to: str | None = None) -> None:
    job = Job(id=name, prompt="x", sampling=LONG, tenant=tenant, reply_to=reply_to)
    fields = {"job": encode_job(job), "tenant": tenant, "cost": 200}
    await worker.redis.xadd(worker.keys.jobs("normal"), fields)


async def began_at(worker, name: str) -> int:
    return int(await worker.redis.hget(worker.keys.job(name), "began_at") or 0)


async def test_a_flood_does_not_have_the_engine_to_itself(harness, tiny_engine):
    """KV for about two sequences, and all jobs are in the engine at once: order is the scheduler's."""
    engine = tiny_engine(max_num_seqs=8, kv_cache_bytes=tokens_of_kv(tiny_engine, 512))
    names = [*(f"flood-{number}" for number in range(5)), "small"]
    hold_until_all_are_there(engine, len(names))
    worker = await harness(engine)
    for name in names:
        await submit(worker, name, name.partition("-")[0], reply_to="ends")
    for name in names:
        await worker.end(name)
    replies = await worker.redis.xrange(worker.keys.replies("ends"))  # in the order in which the jobs ended
    ended = [decode_event(fields[EVENT_FIELD.encode()]).job_id for _, fields in replies]
    assert sorted(ended) == sorted(names)
    assert ended.index("small") <= 2


def hold_until_all_are_there(engine: Engine, num_jobs: int) -> None:
    """Add no sequence to `engine` until there are `num_jobs` of them."""
    add, held = engine.add, []

    def add_together(*args, **options) -> None:
        held.append(partial(add, *args, **options))
        if len(held) == num_jobs:
            for add_one in held:
                add_one()

    engine.add = add_together


def tokens_of_kv(tiny_engine, num_tokens: int) -> int:
    """Bytes of a KV cache that holds `num_tokens`."""
    engine = tiny_engine()
    block_bytes = engine.config.kv_cache_bytes // engine.stats().num_blocks
    return block_bytes * num_tokens // engine.config.block_size
