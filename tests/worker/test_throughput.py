"""The line every ten seconds, and which lines there are beside it."""

import logging
from types import SimpleNamespace

import pytest

from ingine.contract.events import TerminalEvent
from ingine.contract.jobs import Job
from ingine.contract.record import JobStatus
from ingine.engine.outputs import EngineStats
from ingine.worker.metrics import Metrics
from ingine.worker.throughput import Throughput
from tests.waiting import wait_until_async
from tests.worker.test_worker import GREEDY


def stats(**now) -> EngineStats:
    none = dict.fromkeys(
        (
            "num_running", "num_waiting", "num_blocks", "num_free_blocks", "kv_usage", "num_preemptions",
            "prefix_cache_hit_tokens", "prefix_cache_query_tokens", "num_prompt_tokens", "num_output_tokens",
        ), 0,
    )  # fmt: skip
    return EngineStats(**none | now)


def lines(caplog) -> list[dict]:
    return [record.fields for record in caplog.records if record.getMessage() == "throughput"]


@pytest.fixture
def report(caplog):
    """The log line for ten seconds between two states of the engine."""
    metrics, jobs = Metrics(), []
    engine = SimpleNamespace(stats=stats())
    throughput = Throughput(engine, jobs, metrics)

    def report(after: EngineStats, ended: list[JobStatus] = (), held: list = ()) -> list[dict]:
        before, num_lines = throughput._totals(), len(lines(caplog))
        engine.stats, jobs[:] = after, held
        for status in ended:
            metrics.ended(TerminalEvent(position=0, status=status, job_id="a"))
        with caplog.at_level("INFO"):
            throughput._report(throughput._totals() - before, 10.0)
        return lines(caplog)[num_lines:]

    return report


def test_rates_are_of_the_interval_and_the_rest_is_of_now(report):
    first = stats(num_prompt_tokens=50, num_output_tokens=400, prefix_cache_query_tokens=40)
    report(first)
    done = stats(
        num_running=3, num_waiting=2, kv_usage=0.25, num_prompt_tokens=150, num_output_tokens=1400,
        prefix_cache_query_tokens=140, prefix_cache_hit_tokens=25,
    )  # fmt: skip
    ended = [JobStatus.FINISHED, JobStatus.FINISHED, JobStatus.FAILED, JobStatus.CANCELLED]
    (line,) = report(done, ended)
    assert line == {
        "prompt_tokens_per_s": 10.0,
        "output_tokens_per_s": 100.0,
        "running": 3,
        "waiting": 2,
        "kv_usage": 0.25,
        "prefix_hit_rate": 0.25,
        "finished": 2,
        "failed": 1,
    }


def test_a_worker_without_work_says_nothing_and_one_that_stands_still_says_so(report):
    assert report(stats()) == []
    (line,) = report(stats(num_running=1), held=["a job"])
    assert (line["output_tokens_per_s"], line["running"], line["prefix_hit_rate"]) == (0.0, 1, None)


async def test_a_worker_reports_at_info_and_has_no_line_for_a_job(harness, monkeypatch, caplog):
    monkeypatch.setattr("ingine.worker.throughput.INTERVAL_S", 0.05)
    with caplog.at_level(logging.INFO):
        worker = await harness()
        for name in "ab":
            await worker.push(Job(id=name, prompt="x", sampling=GREEDY))
        for name in "ab":
            await worker.end(name)
        await wait_until_async(lambda: sum(line["finished"] for line in lines(caplog)) == 2, what="both")
    assert any(line["output_tokens_per_s"] > 0 for line in lines(caplog))
    assert not [record for record in caplog.records if record.getMessage().startswith("job ")]
