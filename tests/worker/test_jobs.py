"""The table of running jobs forgets a job wholly, and that job alone."""

import asyncio

from ingine.worker.jobs import JobTable, RunningJob
from tests.worker.test_shares import held


async def test_nothing_of_a_job_that_has_left_stays():
    jobs, expired = JobTable(), []
    job = held(jobs, "a", "t", 10)
    job.expiry = asyncio.get_running_loop().call_later(0, expired.append, job)
    assert (jobs.by_seq("a#1"), jobs.by_id("a"), len(jobs), jobs.holds(job.entry)) == (job, job, 1, True)
    jobs.remove(job)
    assert (jobs.by_seq("a#1"), jobs.by_id("a"), len(jobs), jobs.holds(job.entry)) == (None, None, 0, False)
    assert not jobs.leased() and not list(jobs)
    await asyncio.sleep(0.001)
    assert not expired, "its deadline is nobody's business any more"


def test_a_later_attempt_is_not_forgotten_with_an_earlier_one():
    jobs = JobTable()
    first = held(jobs, "a", "t", 10)
    begun = type(first.begun)("run", attempt=2)
    second = RunningJob(first.queue, first.job, first.entry, begun, position=0, num_tokens=10)
    jobs.add(second)
    jobs.remove(first)
    assert jobs.by_id("a") is jobs.by_seq("a#2") is second


def test_what_is_being_begun_has_a_lease_and_is_no_running_job():
    jobs = JobTable()
    job = held(JobTable(), "a", "t", 10)
    with jobs.beginning(job):
        assert jobs.leased() == [job] and not len(jobs)
    assert not jobs.leased()
