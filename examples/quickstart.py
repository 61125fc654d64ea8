"""The smallest producer: it submits one chat and prints the answer as it arrives.

Needs a worker: `ingine worker`.
"""

from ingine import Client

with Client() as client:
    job = client.submit(messages=[{"role": "user", "content": "Why is the sky blue?"}], max_tokens=128)
    for chunk in job.stream():
        print(chunk.text, end="", flush=True)
print()
