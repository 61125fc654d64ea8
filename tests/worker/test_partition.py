"""A partition reads the queue's settings, in which any client may have written anything."""

from types import SimpleNamespace
from typing import Any

import pytest

from ingine.contract.jobs import DEFAULT_MAX_JOB_BYTES
from ingine.worker.partition import Partition


@pytest.fixture
def partition() -> Any:
    partition: Any = object.__new__(Partition)
    partition.intake = SimpleNamespace(max_job_bytes=1, paused=False, wake=lambda: None)
    partition.queue = SimpleNamespace(weights={}, worker_id="w-1")
    partition.stops = []
    partition._stop = lambda: partition.stops.append("stop")
    return partition


@pytest.mark.parametrize("nonsense", ["", "0", "-2", "x", "nan", "inf", "-inf", "1e999"])
def test_a_number_that_is_none_counts_as_not_set(partition, nonsense):
    """A weight of 0 would be divided by, as each job of that tenant is begun."""
    partition._learn({"weight:t": nonsense, "weight:u": "2.5", "max_job_bytes": nonsense})
    assert partition.queue.weights == {"t": 1.0, "u": 2.5}
    assert partition.intake.max_job_bytes == DEFAULT_MAX_JOB_BYTES


@pytest.mark.parametrize(
    ("switches", "stops"),
    [({}, 0), ({"drain:w-2": "1"}, 0), ({"drain:w-1": "0"}, 0), ({"drain:w-1": "1"}, 1)],
    ids=["none", "another's", "off", "ours"],
)
def test_only_the_switch_of_its_own_id_drains_a_worker(partition, switches, stops):
    partition._learn(switches)
    assert len(partition.stops) == stops
