"""The jobs of a run: job number n of a seed is always the same, so the audit can derive it."""

import random
from dataclasses import dataclass
from typing import Any

POISON = "POISON"
"""A prompt with this prefix kills every worker that computes it."""

NUM_GREEDY = 40
"""Number of different greedy requests: few, so that one uninterrupted run of them all checks every job."""
LENGTHS = (8, 24, 60, 100, 160, 300)


@dataclass(frozen=True)
class JobSpec:
    number: int
    prompt: str
    sampling: dict[str, Any]
    greedy: int | None
    """Index of the greedy request; None if sampled or poison."""
    poison: bool = False
    priority: str = "normal"
    tenant: str | None = None
    deadline_s: float | None = None
    not_before_s: float | None = None
    cancel_after_s: float | None = None
    stream: bool = True
    reply_to: str | None = None
    named: bool = True
    """True if it has its own job id, else it has an idempotency key.

    Either identifies a repeated submission.
    """

    def arguments(self) -> dict[str, Any]:
        """Arguments of `submit`."""
        return {
            "prompt": self.prompt,
            "sampling": self.sampling,
            "priority": self.priority,
            "tenant": self.tenant,
            "deadline_s": self.deadline_s,
            "not_before_s": self.not_before_s,
            "stream": self.stream,
            "reply_to": self.reply_to,
            "metadata": {"number": self.number},
            "job_id": f"job-{self.number}" if self.named else None,
            "idempotency_key": None if self.named else f"chaos-{self.number}",
        }


def greedy_requests() -> list[tuple[str, dict[str, Any]]]:
    """Prompts and sampling parameters. Some stop at a string, some have logprobs, some penalties."""
    requests = []
    for index in range(NUM_GREEDY):
        sampling: dict[str, Any] = {"temperature": 0, "max_tokens": LENGTHS[index % len(LENGTHS)]}
        if index % 5 == 1:
            sampling["stop"] = ["q", "7"]
        if index % 7 == 2:
            sampling["logprobs"] = 20
        if index % 9 == 4:
            sampling["frequency_penalty"] = 0.5
        requests.append((f"Story {index}: " + "once upon a time " * (index % 4), sampling))
    return requests


def spec(seed: int, number: int, *, poison_every: int = 0) -> JobSpec:
    draw = random.Random(f"{seed}:job:{number}")
    if poison_every and number % poison_every == poison_every // 2:
        return JobSpec(number, f"{POISON} {number}", {"temperature": 0, "max_tokens": 8}, None, poison=True)
    index = draw.randrange(NUM_GREEDY)
    prompt, sampling = greedy_requests()[index]
    if sampled := draw.random() < 0.15:
        sampling = {"temperature": 1.0, "top_p": 0.9, "seed": number, "max_tokens": draw.choice(LENGTHS)}
    return JobSpec(
        number,
        prompt,
        sampling,
        None if sampled else index,
        priority=draw.choices(("high", "normal", "low"), (1, 4, 1))[0],
        tenant=draw.choice((None, "ada", "bob")),
        deadline_s=draw.uniform(2.0, 5.0) if draw.random() < 0.05 else None,
        not_before_s=draw.uniform(0.2, 2.0) if draw.random() < 0.05 else None,
        cancel_after_s=draw.uniform(0.0, 1.5) if draw.random() < 0.04 else None,
        stream=draw.random() > 0.1,
        reply_to="audit" if draw.random() < 0.2 else None,
        named=draw.random() < 0.5,
    )
