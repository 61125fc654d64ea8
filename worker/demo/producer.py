"""One of the demo's producers, a process of its own: python -m worker.demo.producer INDEX COUNT

It asks every COUNT-th question, all at once as soon as a line comes in, and prints what it submitted: one
JSON object a line. Nothing of it streams: consumers attach from elsewhere.
"""

import json
import sys
import time

from producer import Client
from worker.demo.prompts import QUESTIONS


def main(index: int, count: int) -> None:
    with Client() as client:
        print("ready", flush=True)
        if not sys.stdin.readline():
            return
        for number in range(index, len(QUESTIONS), count):
            question = QUESTIONS[number]
            submitted_at = time.time()
            handle = client.submit(
                messages=[{"role": "user", "content": question.text}],
                priority=question.priority,
                sampling={"max_tokens": question.max_tokens, "temperature": 0.7, "seed": number},
            )
            submitted = {"number": number, "job_id": handle.job_id, "submitted_at": submitted_at}
            print(json.dumps(submitted), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
