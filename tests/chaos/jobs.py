"""The jobs of a run: job number n of a seed is always the same, so the audit can derive it."""

import random
from dataclasses import dataclass
from typing import Any

from tests.chaos.requests import Request, requests

POISON = "POISON"
"""A prompt with this prefix kills every worker that computes it."""
ALL = requests()


@dataclass(frozen=True)
class JobSpec:
    number: int
    asks: Request
    request: int | None
    """Index of what it asks among all requests; None if it is poison."""
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
            **self.asks.input,
            "sampling": self.asks.sampling,
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


def spec(seed: int, number: int, *, poison_every: int = 0) -> JobSpec:
    draw = random.Random(f"{seed}:job:{number}")
    if poison_every and number % poison_every == poison_every // 2:
        poison = Request({"temperature": 0, "max_tokens": 8}, {"prompt": f"{POISON} {number}"})
        return JobSpec(number, poison, None, poison=True)
    index = draw.randrange(len(ALL))
    return JobSpec(
        number,
        ALL[index],
        index,
        priority=draw.choices(("high", "normal", "low"), (1, 4, 1))[0],
        tenant=draw.choice((None, "ada", "bob")),
        deadline_s=draw.uniform(2.0, 5.0) if draw.random() < 0.05 else None,
        not_before_s=draw.uniform(0.2, 2.0) if draw.random() < 0.05 else None,
        cancel_after_s=draw.uniform(0.0, 1.5) if draw.random() < 0.04 else None,
        stream=draw.random() > 0.1,
        reply_to="audit" if draw.random() < 0.2 else None,
        named=draw.random() < 0.5,
    )
