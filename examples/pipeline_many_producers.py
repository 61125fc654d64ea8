"""A pipeline: many producers, which wait for nothing, and one collector that reads what has ended.

Every job names the same replies stream. Its terminal event arrives there, whoever submitted it, so the
collector need not know the jobs beforehand; what it shall know of them travels in `metadata`. It is a
plain Redis stream: a collector that remembers the last entry id it has dealt with may be restarted at will.
"""

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from uuid import uuid4

from redis import Redis

from ingine.wire import EVENT_FIELD, JobStatus, Keys, TerminalEvent, decode_event
from producer import Client
from producer.settings import load_settings

NUM_PRODUCERS = 3
REVIEWS = ["It broke in a week.", "Best purchase this year.", "It is all right, I suppose.", "Never again!"]
BLOCK_MS = 2000
"""Under redis-py's own timeout for an answer, which would cut a longer wait."""


def produce(number: int, replies: str) -> int:
    """One producer, in a process of its own. Returns how many jobs it has submitted."""
    jobs = [
        {
            "messages": [{"role": "user", "content": f"In one word, is this review good or bad? {review}"}],
            "sampling": {"max_tokens": 8, "temperature": 0},
            "priority": "low",
            "stream": False,
            "reply_to": replies,
            "metadata": {"producer": number, "review": review},
            # A producer that dies and starts over submits the same keys again, and nothing runs twice.
            "idempotency_key": f"{replies}-{number}-{index}",
        }
        for index, review in enumerate(REVIEWS)
    ]
    with Client() as client:
        return len(client.submit_many(jobs))


def collect(redis: Redis, stream: str, after: str = "0") -> Iterator[tuple[str, TerminalEvent]]:
    """Terminal events of the stream with their entry ids, those after `after`, for ever."""
    while True:
        for _, entries in redis.xread({stream: after}, block=BLOCK_MS) or []:
            for entry_id, fields in entries:
                after = entry_id.decode()
                yield after, decode_event(fields[EVENT_FIELD.encode()])


def main() -> None:
    settings = load_settings()
    replies = f"reviews-{uuid4().hex[:8]}"
    with ProcessPoolExecutor(NUM_PRODUCERS, mp_context=get_context("spawn")) as pool:
        num_jobs = sum(pool.map(produce, range(NUM_PRODUCERS), [replies] * NUM_PRODUCERS))

    redis = Redis.from_url(settings.redis_url, protocol=2)
    with redis, Client() as client:
        stream = Keys(settings.queue).replies(replies)
        for number, (_, event) in enumerate(collect(redis, stream), start=1):
            # The event says how it ended; the text is in the log, until the result's TTL.
            finished = event.status is JobStatus.FINISHED
            answer = client.attach(event.job_id).result().text if finished else f"({event.status})"
            print(f"producer {event.metadata['producer']}: {event.metadata['review']} -> {answer.strip()!r}")
            if number == num_jobs:
                break


if __name__ == "__main__":
    main()
