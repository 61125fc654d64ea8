"""The schedule is a function of its seed, and has all kinds of faults."""

import itertools
from collections import Counter

import pytest

from tests.chaos.jobs import spec
from tests.chaos.proxy import FAULTS as WIRE_FAULTS
from tests.chaos.schedule import AMONG_SERVERS, ONLY_WITH_REPLICA, PER_MINUTE, fate, schedule


def test_the_same_seed_gives_the_same_run():
    assert schedule(7, 60) == schedule(7, 60)
    assert schedule(7, 60) != schedule(8, 60)
    assert fate(7, 3) == fate(7, 3)
    assert spec(7, 3) == spec(7, 3)
    assert [spec(7, n) for n in range(20)] != [spec(8, n) for n in range(20)]


@pytest.mark.parametrize("seed", range(5))
def test_ten_minutes_bring_what_the_table_promises(seed):
    faults = schedule(seed, 600)
    counts = Counter(fault.kind for fault in faults)
    assert set(counts) == set(PER_MINUTE)
    assert counts["kill_worker"] >= 80 and counts["kill_server"] >= 10
    assert sum(counts[kind] for kind in WIRE_FAULTS) >= 200
    assert faults == sorted(faults) and faults[0].at_s >= 0 and faults[-1].at_s <= 600
    servers = [fault.at_s for fault in faults if fault.kind in AMONG_SERVERS]
    slot_s = 600 / len(servers)
    assert all(later - earlier >= slot_s / 2 for earlier, later in itertools.pairwise(servers))


def test_a_short_run_has_one_of_each():
    assert set(Counter(fault.kind for fault in schedule(1, 10))) == set(PER_MINUTE)
    assert set(PER_MINUTE) - {f.kind for f in schedule(1, 10, replica=False)} == set(ONLY_WITH_REPLICA)
