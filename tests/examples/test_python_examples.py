"""The Python examples, each run as a program of its own against a real worker with a tiny model."""

from examples.async_streams import HEROES
from examples.pipeline_many_producers import NUM_PRODUCERS, REVIEWS


def test_quickstart(run_example):
    assert len(run_example("quickstart.py")) > 2


def test_async_streams_tell_every_story(run_example):
    lines = run_example("async_streams.py").splitlines()
    assert sorted(line.partition(": ")[0] for line in lines) == sorted(HEROES)
    for line in lines:
        assert line.partition(": ")[2][0] in "'\"", line  # a story, not an error


def test_the_collector_gets_every_producers_jobs(run_example):
    lines = run_example("pipeline_many_producers.py").splitlines()
    expected = [f"producer {number}: {review}" for number in range(NUM_PRODUCERS) for review in REVIEWS]
    assert sorted(line.partition(" -> ")[0] for line in lines) == sorted(expected)
    assert "(failed)" not in "".join(lines)
