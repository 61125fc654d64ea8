"""The events that a worker keeps of a running job, however long its output, and a server that loses more."""

import tracemalloc

import pytest

import ingine.worker.sent
from ingine.contract.calls.running import Append
from ingine.contract.events import TokensEvent
from ingine.contract.jobs import Job
from ingine.sampling_params import SamplingParams
from ingine.worker.sent import KEPT_BYTES, Sent
from tests.waiting import wait_until_async
from tests.worker.test_publisher import LOSE_TAIL

NUM_TOKENS = 20_000
STEPS_AHEAD = 3

TOP = [[100_000 + n, -float(n)] for n in range(20)]
EVENTS = {
    "plain": lambda position: TokensEvent(position, [100_000 + position], " word"),
    "with the most log probabilities": lambda position: TokensEvent(
        position,
        [100_000 + position],
        " word",
        [
            {
                "token_id": 100_000 + position,
                "logprob": -1.5,
                "top": TOP,
                "bytes": [32, 119, 111, 114, 100],
                "top_bytes": [[32, 119, 111, 114, 100]] * 20,
            }
        ],
    ),
}


def sent_by_a_job(make_event, num_tokens: int, *, is_committed: bool = True) -> Sent:
    sent = Sent(start=0)
    for position in range(1, num_tokens + 1):
        committed = max(0, position - STEPS_AHEAD) if is_committed else 0
        sent.add(Append("job", 1, make_event(position), publish=True), committed)
    return sent


@pytest.mark.parametrize("name", EVENTS)
def test_memory_does_not_grow_with_the_output(name):
    tracemalloc.start()
    sent = sent_by_a_job(EVENTS[name], NUM_TOKENS)
    kept_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept_bytes < 1.25 * KEPT_BYTES  # the sum of what is sent is 8 MB, and 30 with log probabilities
    for position in range(NUM_TOKENS - STEPS_AHEAD, NUM_TOKENS):
        assert sent.goes_on_from(position), "it may have to be sent again at once"


def test_what_is_not_committed_is_kept_whatever_it_takes():
    num_tokens = 2 * KEPT_BYTES // 1000
    sent = sent_by_a_job(EVENTS["with the most log probabilities"], num_tokens, is_committed=False)
    position = 0
    while following := sent.after(position):
        assert following.start == position
        position = following.position
    assert position == num_tokens


def test_only_a_log_that_ends_where_an_event_begins_can_be_written_on():
    sent = Sent(start=0)
    for token_ids, position in (([1, 2], 2), ([3, 4, 5], 5)):
        sent.add(Append("job", 1, TokensEvent(position, token_ids, ""), publish=True), committed=0)
    assert [position for position in range(7) if sent.goes_on_from(position)] == [0, 2]
    sent.forget_after(2)
    assert [position for position in range(7) if sent.goes_on_from(position)] == [0]
    assert sent.end == 2


def test_the_next_event_begins_where_the_attempt_began_until_one_is_sent():
    sent = Sent(start=7)
    assert sent.end == 7
    sent.add(Append("job", 2, TokensEvent(9, [1, 2], ""), publish=True), committed=7)
    assert sent.end == 9
    sent.forget_after(7)
    assert (sent.end, sent.after(7)) == (7, None)


SAMPLING = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, logprobs=3)


async def lose_half_of_the_log(worker, monkeypatch) -> tuple[list[int], int, int]:
    """Ids of the tokens in the end, how many the log was left with, and the attempts that it took."""
    append, kept = worker.queue.append, []

    async def append_after_a_loss(appends):
        if not kept and appends[0].start >= 40:
            kept.append(await worker.redis.eval(LOSE_TAIL, 2, worker.keys.job("a"), worker.keys.tokens("a")))
        return await append(appends)

    monkeypatch.setattr(worker.queue, "append", append_after_a_loss)
    await worker.push(Job(id="a", prompt="x", sampling=SAMPLING))
    *tokens, end = await worker.events("a")  # which checks that no position is missing
    assert end.position == 60
    assert all(len(event.logprobs) == len(event.token_ids) for event in tokens)
    return [token_id for event in tokens for token_id in event.token_ids], kept[0], end.timings["attempts"]


async def test_a_loss_that_is_kept_is_written_again_by_the_same_attempt(harness, monkeypatch):
    worker = await harness()
    _, kept, attempts = await lose_half_of_the_log(worker, monkeypatch)
    assert 0 < kept < 40 and attempts == 1


async def test_of_a_larger_loss_the_tokens_are_made_again(harness, monkeypatch):
    monkeypatch.setattr(ingine.worker.sent, "KEPT_BYTES", 2000)
    loser = await harness()
    tokens, kept, attempts = await lose_half_of_the_log(loser, monkeypatch)
    assert 0 < kept < 40 and attempts == 2
    await loser.push(Job(id="b", prompt="x", sampling=SAMPLING))
    undisturbed = [token_id for event in (await loser.events("b"))[:-1] for token_id in event.token_ids]
    assert tokens == undisturbed
    assert await loser.redis.hget(loser.keys.job("a"), "deaths") == b"0", "nobody died"
    assert loser.worker._metrics.log_rollbacks._value.get() == 1
    await wait_until_async(lambda: not len(loser.worker._jobs), what="the end of all jobs")


@pytest.mark.parametrize("off_by", [-1, 1])
async def test_a_position_that_the_log_does_not_have_is_a_bad_record(harness, off_by):
    """Somebody has set it: the job is buried, and not given back for ever."""
    loser = await harness()
    await loser.push(Job(id="a", prompt="x", sampling=SamplingParams(temperature=0, ignore_eos=True)))
    await wait_until_async(lambda: loser.position("a"), what="tokens")
    await loser.stop()
    await loser.redis.hset(loser.keys.job("a"), "position", await loser.position("a") + off_by)
    heir = await harness()
    (dead,) = await wait_until_async(heir.dead_letters, what="a dead letter")
    assert dead[b"code"] == b"bad_record"
    await heir.push(Job(id="b", prompt="x", sampling=SAMPLING))
    assert (await heir.end("b")).position == 60, "the worker goes on"
