"""A pipeline: many producers that submit without waiting, and one collector that reads the results.

Every job names the same replies stream, which gets the terminal events of all of them. So the collector does
not need to know the jobs in advance; `metadata` carries what it needs of each. A collector that stores the
`position` of the last reply that it has handled may be restarted at any time.
"""

from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from multiprocessing import get_context
from uuid import uuid4

from ingine import Client

NUM_PRODUCERS = 3
REVIEWS = ["It broke in a week.", "Best purchase this year.", "It is all right, I suppose.", "Never again!"]


def produce(number: int, replies: str) -> int:
    """Submit jobs, as one producer in a process of its own. Returns their number."""
    jobs = [
        {
            "messages": [{"role": "user", "content": f"In one word, is this review good or bad? {review}"}],
            "sampling": {"max_tokens": 8, "temperature": 0},
            "priority": "low",
            "stream": False,
            "reply_to": replies,
            "metadata": {"producer": number, "review": review},
            # A restarted producer submits the same keys again, and no job runs twice.
            "idempotency_key": f"{replies}-{number}-{index}",
        }
        for index, review in enumerate(REVIEWS)
    ]
    with Client() as client:
        return len(client.submit_many(jobs))


def main() -> None:
    name = f"reviews-{uuid4().hex[:8]}"
    with ProcessPoolExecutor(NUM_PRODUCERS, mp_context=get_context("spawn")) as pool:
        num_jobs = sum(pool.map(produce, range(NUM_PRODUCERS), [name] * NUM_PRODUCERS))

    with Client() as client:
        for reply in islice(client.replies(name), num_jobs):
            # The reply says how the job ended; the text is in the log until the result's TTL.
            finished = reply.status == "finished"
            answer = client.attach(reply.job_id).result().text if finished else f"({reply.status})"
            about = reply.metadata or {}
            print(f"producer {about['producer']}: {about['review']} -> {answer.strip()!r}")


if __name__ == "__main__":
    main()
