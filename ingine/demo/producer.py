"""One of the demo's producer processes: python -m ingine.demo.producer INDEX COUNT

It reads the plan, one line, from standard input, submits every COUNT-th question of it at once, and prints
one JSON object per job. It does not stream: consumers attach from another process.
"""

import json
import sys
import time

from ingine.demo.plan import Plan
from ingine.demo.prompts import QUESTIONS
from ingine.producer import Client


def main(index: int, count: int) -> None:
    with Client() as client:
        print("ready", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        plan = Plan.from_line(line)
        for number in map(int, list(plan.max_tokens)[index::count]):
            question, max_tokens = QUESTIONS[number], plan.max_tokens[str(number)]
            messages = [{"role": "user", "content": question.text}]
            submitted_at = time.time()
            handle = client.submit(
                None if plan.is_chat else question.text,
                messages=messages if plan.is_chat else None,
                priority=question.priority,
                sampling={"max_tokens": max_tokens, "temperature": 0.7, "seed": number},
            )
            submitted = {"number": number, "job_id": handle.job_id, "submitted_at": submitted_at}
            print(json.dumps(submitted), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
