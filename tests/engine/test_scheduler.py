"""Which tokens run next: one budget, one order, and nobody waits for ever."""

from itertools import count

from hypothesis import given, settings
from hypothesis import strategies as st

from ingine.engine.request import EngineRequest
from ingine.engine.schedule.block_manager import BlockManager
from ingine.engine.schedule.scheduler import ScheduledBatch, Scheduler
from ingine.engine.schedule.sequence import Sequence
from ingine.sampling_params import SamplingParams

AGEING_S = 30.0
_serials = count()


def make_scheduler(*, num_blocks: int = 64, block_size: int = 4, max_num_seqs: int = 4, budget: int = 16):
    return Scheduler(
        BlockManager(num_blocks, block_size), max_num_seqs=max_num_seqs, max_num_batched_tokens=budget
    )


def make_sequence(
    seq_id: str, num_tokens: int, *, arrival: float = 0, priority: int = 0, max_tokens: int = 100
):
    """No two have a prefix in common."""
    serial = next(_serials)
    return Sequence(
        EngineRequest(seq_id, [serial] * num_tokens, SamplingParams(max_tokens=max_tokens)),
        seed=0,
        sort_key=(arrival + priority * AGEING_S, serial),
        max_num_tokens=10_000,
    )


def run(scheduler: Scheduler, batch: ScheduledBatch) -> list[Sequence]:
    """A step without a model: who has caught up gets a token. Returns the finished."""
    scheduler.advance(batch)
    scheduler.settle(batch)
    finished = []
    for seq in batch.caught_up:
        seq.append(0)
        if seq.finish_reason:
            scheduler.remove(seq)
            finished.append(seq)
    scheduler.block_manager.check_integrity(scheduler.running)
    return finished


def work(batch: ScheduledBatch) -> dict[str, int]:
    return {seq.seq_id: num for seq, num in zip(batch.seqs, batch.num_tokens, strict=True)}


def test_a_long_prompt_is_cut_and_a_decode_goes_on_beside_it():
    scheduler = make_scheduler(budget=16)
    scheduler.add(make_sequence("short", 4, arrival=1))
    run(scheduler, scheduler.schedule())
    scheduler.add(make_sequence("long", 40, arrival=2))
    steps = []
    for _ in range(4):
        batch = scheduler.schedule()
        steps.append(work(batch))
        run(scheduler, batch)
    assert steps == [
        {"short": 1, "long": 15},
        {"short": 1, "long": 15},
        {"short": 1, "long": 10},
        {"short": 1, "long": 1},
    ]


def test_an_urgent_long_prompt_leaves_a_token_for_each_that_runs():
    scheduler = make_scheduler(budget=16)
    for seq_id in "ab":
        scheduler.add(make_sequence(seq_id, 4, arrival=1, priority=1))
    run(scheduler, scheduler.schedule())
    scheduler.add(make_sequence("urgent", 40, arrival=2))
    run(scheduler, scheduler.schedule())
    assert work(scheduler.schedule()) == {"urgent": 14, "a": 1, "b": 1}


def test_several_prompts_are_prefilled_in_one_step():
    scheduler = make_scheduler(budget=16)
    for index in range(3):
        scheduler.add(make_sequence(str(index), 5, arrival=index))
    assert work(scheduler.schedule()) == {"0": 5, "1": 5, "2": 5}


def test_no_more_than_max_num_seqs_run():
    scheduler = make_scheduler(max_num_seqs=2)
    for index in range(3):
        scheduler.add(make_sequence(str(index), 2, arrival=index))
    assert work(scheduler.schedule()) == {"0": 2, "1": 2}


def test_priority_comes_before_arrival():
    scheduler = make_scheduler(max_num_seqs=1)
    scheduler.add(make_sequence("early", 2, arrival=0, priority=1))
    scheduler.add(make_sequence("urgent", 2, arrival=5, priority=0))
    assert work(scheduler.schedule()) == {"urgent": 2}


def test_who_has_waited_long_enough_comes_before_a_better_priority():
    scheduler = make_scheduler(max_num_seqs=1)
    scheduler.add(make_sequence("urgent", 2, arrival=AGEING_S + 1, priority=0))
    scheduler.add(make_sequence("early", 2, arrival=0, priority=1))
    assert work(scheduler.schedule()) == {"early": 2}


def test_a_stream_of_urgent_ones_does_not_starve_a_patient_one():
    """One urgent sequence comes every second and takes a second: there is never an idle moment."""
    scheduler = make_scheduler(max_num_seqs=1)
    scheduler.add(make_sequence("patient", 2, priority=2, max_tokens=1))
    for second in range(200):
        scheduler.add(make_sequence(f"urgent {second}", 2, arrival=second, max_tokens=1))
        if any(seq.seq_id == "patient" for seq in run(scheduler, scheduler.schedule())):
            break
    assert 2 * AGEING_S <= second <= 2 * AGEING_S + 1


def test_nobody_overtakes_the_first_that_has_no_room():
    scheduler = make_scheduler(num_blocks=6)
    scheduler.add(make_sequence("running", 12, arrival=0))
    run(scheduler, scheduler.schedule())
    scheduler.add(make_sequence("large", 14, arrival=1))
    scheduler.add(make_sequence("small", 2, arrival=2))
    assert work(scheduler.schedule()) == {"running": 1}


def fill_memory(scheduler: Scheduler, *seqs: Sequence) -> list[str]:
    """Decode until somebody has to go. Returns who."""
    for seq in seqs:
        scheduler.add(seq)
    while True:
        batch = scheduler.schedule()
        if batch.preempted:
            return [seq.seq_id for seq in batch.preempted]
        run(scheduler, batch)


def test_the_victim_is_the_latest():
    scheduler = make_scheduler(num_blocks=6)
    assert fill_memory(scheduler, make_sequence("a", 4, arrival=0), make_sequence("b", 4, arrival=1)) == ["b"]


def test_of_several_the_victim_is_still_the_latest():
    scheduler = make_scheduler(num_blocks=6)
    seqs = [make_sequence(name, 4, arrival=arrival) for arrival, name in enumerate("abc")]
    assert fill_memory(scheduler, *seqs) == ["c"]


def test_nobody_comes_in_who_would_soon_be_preempted():
    """There are exactly the blocks that it needs, and the running sequence will need one of them."""
    scheduler = make_scheduler(num_blocks=6)
    scheduler.add(make_sequence("running", 12, arrival=0))
    run(scheduler, scheduler.schedule())
    scheduler.add(make_sequence("newcomer", 8, arrival=1))
    assert work(scheduler.schedule()) == {"running": 1}


def test_the_victim_is_the_least_urgent_even_if_it_came_first():
    scheduler = make_scheduler(num_blocks=6)
    low, high = make_sequence("low", 4, arrival=0, priority=1), make_sequence("high", 4, arrival=1)
    assert fill_memory(scheduler, low, high) == ["low"]


def test_a_victim_waits_with_its_old_key_and_without_blocks():
    scheduler = make_scheduler(num_blocks=6)
    victim = make_sequence("b", 4, arrival=1)
    fill_memory(scheduler, make_sequence("a", 4, arrival=0), victim)
    scheduler.add(make_sequence("later", 4, arrival=2))
    assert [seq.seq_id for seq in scheduler.waiting] == ["b", "later"]
    assert not victim.block_table and victim.num_computed_tokens == 0
    assert scheduler.num_preemptions == 1


def test_a_victim_finds_what_is_left_of_its_prefix():
    scheduler = make_scheduler(num_blocks=8)
    first, victim = make_sequence("a", 4, arrival=0, max_tokens=14), make_sequence("b", 8, arrival=1)
    fill_memory(scheduler, first, victim)
    while victim not in scheduler.running:
        run(scheduler, scheduler.schedule())
    assert victim.num_computed_tokens > 0
    assert scheduler.prefix_cache_hit_tokens > 0


@settings(max_examples=60, deadline=None)
@given(
    num_blocks=st.integers(6, 20),
    budget=st.integers(3, 12),
    arrivals=st.lists(
        st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2)), min_size=1, max_size=10
    ),
)
def test_everything_finishes_and_the_most_urgent_advances_in_every_step(num_blocks, budget, arrivals):
    """24 tokens at most a sequence: each fits memory alone, and few fit it together."""
    scheduler = make_scheduler(num_blocks=num_blocks, max_num_seqs=3, budget=budget)
    seqs = [
        make_sequence(str(index), num_tokens, arrival=index, priority=priority, max_tokens=max_tokens)
        for index, (num_tokens, max_tokens, priority) in enumerate(arrivals)
    ]
    upcoming, finished = list(seqs), []
    for _ in range(2000):
        if len(finished) == len(seqs):
            return
        if upcoming:
            scheduler.add(upcoming.pop(0))
        most_urgent = scheduler.running[0] if scheduler.running else None
        batch = scheduler.schedule()
        assert 0 < sum(batch.num_tokens) <= budget and len(batch.seqs) <= 3
        assert most_urgent is None or most_urgent in batch.seqs
        finished += run(scheduler, batch)
    raise AssertionError("2000 steps were not enough")
