"""Rates from two heartbeats or positions, latencies from the records of jobs that were seen running."""

from ingine.producer.watch import Snapshot
from ingine.top.figures import Percentiles
from tests.top.boards import beat, figures, job, queue_info


def snapshot(workers: dict, jobs=()) -> Snapshot:
    return Snapshot(queue_info(workers), list(jobs))


def test_a_worker_s_rate_is_the_growth_between_its_heartbeats():
    beats = [beat(at_s=100 + n, num_output_tokens=1000 + 50 * n, num_ended=10 + 2 * n) for n in range(4)]
    read = figures(*((n + 0.4 * (n % 2), snapshot({"a": beats[n], "b": beat()})) for n in range(4)))
    assert read.worker_tokens_per_s == {"a": 50}
    assert (read.tokens_per_s, read.ended_per_s) == (50, 2)


def test_one_heartbeat_read_twice_is_no_rate():
    read = figures((0.0, snapshot({"a": beat()})), (1.0, snapshot({"a": beat()})))
    assert (read.tokens_per_s, read.ended_per_s, read.worker_tokens_per_s) == (None, None, {})


def test_a_rate_covers_the_last_ten_seconds():
    totals = [0] * 30 + [100 * n for n in range(1, 12)]
    read = figures(*((n, snapshot({"a": beat(at_s=n, num_output_tokens=t)})) for n, t in enumerate(totals)))
    assert read.worker_tokens_per_s == {"a": 100}


def test_a_total_that_falls_starts_afresh():
    totals = [1000, 2000, 5, 25]
    read = figures(*((n, snapshot({"a": beat(at_s=n, num_output_tokens=t)})) for n, t in enumerate(totals)))
    assert read.worker_tokens_per_s == {"a": 20}


def test_a_silent_worker_has_no_rate():
    beats = [beat(at_s=1), beat(at_s=2, num_output_tokens=9000, silent_s=20)]
    read = figures(*((n, snapshot({"a": each})) for n, each in enumerate(beats)))
    assert (read.tokens_per_s, read.worker_tokens_per_s) == (None, {})


def test_nonsense_in_a_heartbeat_is_no_number():
    for value in ("many", None, [], True, 1e300, float("inf")):
        beats = [beat(at_s=1, num_output_tokens=value), beat(at_s=2, num_output_tokens=value)]
        read = figures(*((n, snapshot({"a": each})) for n, each in enumerate(beats)))
        assert read.tokens_per_s is None


def test_a_job_s_rate_is_the_growth_of_its_position():
    read = figures(*((0.5 * n, snapshot({}, [job("a", position=10 * n)])) for n in range(5)))
    assert read.job_tokens_per_s == {"a": 20}


def test_latencies_of_the_jobs_seen_in_the_last_minute():
    def jobs(numbers):
        return [job(str(n), began_at_ms=10_000 + 10 * n, first_token_at_ms=10_000 + 20 * n) for n in numbers]

    old = snapshot({}, jobs([100_000]))
    read = figures(
        (0.0, old), (61.0, snapshot({}, jobs(range(1, 51)))), (62.0, snapshot({}, jobs(range(51, 101))))
    )
    assert read.wait_s == Percentiles(p50=0.5, p95=0.95)
    assert read.first_token_s == Percentiles(p50=1.0, p95=1.9)


def test_a_job_without_a_token_or_that_began_again_has_no_such_latency():
    read = figures((0.0, snapshot({}, [job("a", attempt=2, first_token_at_ms=None)])))
    assert (read.wait_s, read.first_token_s) == (None, None)
