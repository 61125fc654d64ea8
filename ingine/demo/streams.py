"""The state of each stream of the demo, as its consumer sees it."""

import asyncio
import time
from dataclasses import dataclass, field

from ingine.demo.prompts import Question
from ingine.errors import ClientError
from ingine.producer import AsyncClient


@dataclass
class Stream:
    """One job and what its consumer has received."""

    number: int
    question: Question
    job_id: str
    submitted_at: float
    """Unix time in seconds, by this machine's clock."""

    text: str = ""
    seen: list[tuple[int, list[int]]] = field(default_factory=list)
    """Position and token ids of every chunk, in order of arrival."""
    first_token_s: float | None = None
    """Seconds from submission to the first chunk."""
    interrupted_at: int | None = None
    """The job's committed position when its worker was killed."""
    ending: str | None = None
    """"finished", or the error. None while the stream goes on."""

    @property
    def position(self) -> int:
        return self.seen[-1][0] if self.seen else 0

    @property
    def running(self) -> bool:
        return bool(self.seen) and not self.ending

    @property
    def resumed(self) -> bool:
        return self.interrupted_at is not None and self.position > self.interrupted_at

    async def follow(self, client: AsyncClient, news: asyncio.Condition) -> None:
        """Consume the stream to its end, notifying `news` of each chunk. Stores errors in `ending`."""
        try:
            async for chunk in client.attach(self.job_id).stream():
                if self.first_token_s is None:
                    self.first_token_s = time.time() - self.submitted_at
                if chunk.token_ids:
                    self.seen.append((chunk.position, chunk.token_ids))
                self.text += chunk.text
                async with news:
                    news.notify_all()
            self.ending = "finished"
        except ClientError as error:
            self.ending = f"{type(error).__name__}: {error}"
        async with news:
            news.notify_all()
