"""Consumers: late, dropped and resumed, slow, frozen and killed.

A journal records what each stream received.
"""

import asyncio
import hashlib
from contextlib import aclosing
from pathlib import Path
from typing import Any

from ingine.errors import ClientError, JobCancelled, JobExpired, JobFailed, JobNotFound
from ingine.producer import AsyncClient, Chunk
from tests.chaos.journal import Journal, Tail, read

POLL_S = 0.1
ENDINGS = {JobFailed: "failed", JobCancelled: "cancelled", JobExpired: "expired"}


def run(**options) -> None:
    asyncio.run(_Consumer(**options).run())


class _Consumer:
    """Follows the jobs in the producers' journals whose number is `remainder` modulo `modulus`, each with its
    own habit, until all `end` jobs are known and have been followed to their end."""

    def __init__(
        self,
        *,
        url: str,
        queue: str,
        journal: str,
        sources: list[str],
        remainder: int,
        modulus: int,
        end: int,
    ):
        self._client = AsyncClient(url, queue=queue)
        self._sources = [Tail(Path(source)) for source in sources]
        self._remainder, self._modulus, self._end = remainder, modulus, end
        self._seen: dict[str, int] = {}
        self._ended: set[str] = set()
        for record in read(Path(journal)):
            if "end" in record:
                self._ended.add(record["job_id"])
            elif "ids" in record:
                self._seen[record["job_id"]] = record["position"]
        self._journal = Journal(Path(journal))

    async def run(self) -> None:
        known: set[str] = set()
        numbers: set[int] = set()
        wanted = set(range(self._remainder, self._end, self._modulus))
        async with asyncio.TaskGroup() as group:
            while numbers < wanted:
                for record in (record for source in self._sources for record in source.read()):
                    number, job_id = record.get("number"), record.get("job_id")
                    if job_id and job_id not in known and number in wanted:
                        known.add(job_id)
                        numbers.add(number)
                        if job_id not in self._ended:
                            group.create_task(self._follow(job_id))
                await asyncio.sleep(POLL_S)
        await self._client.aclose()

    async def _follow(self, job_id: str) -> None:
        """Follow a job to its end, through every error that a consumer may get."""
        habit = hashlib.blake2b(job_id.encode(), digest_size=2).digest()
        if habit[0] % 4 == 1:
            await asyncio.sleep(habit[1] / 50)  # late: perhaps after the end
        drop_after = 1 + habit[1] % 40 if habit[0] % 4 == 2 else None
        pause_s = 0.05 if habit[0] % 8 == 3 else 0.0
        while True:
            try:
                if await self._stream(job_id, drop_after, pause_s, ask_again=habit[1] % 3 == 0):
                    return
            except JobNotFound as error:
                return self._journal.write(job_id=job_id, end="unknown", error=str(error))
            except ClientError as error:
                if ending := ENDINGS.get(type(error)):
                    code = getattr(error, "code", None)
                    return self._journal.write(job_id=job_id, end=ending, code=code)
                self._journal.write(job_id=job_id, unavailable=str(error))
                await asyncio.sleep(0.2)

    async def _stream(self, job_id: str, drop_after: int | None, pause_s: float, *, ask_again: bool) -> bool:
        """Read the stream, and drop it after so many chunks. Returns True if it reached the end.

        ask_again: ask for the whole result of a finished job, too.
        """
        start = self._seen.get(job_id, 0)
        self._journal.write(job_id=job_id, attached=start)
        num_chunks = 0
        async with aclosing(self._client.attach(job_id, start).stream()) as chunks:
            async for chunk in chunks:
                more = {} if chunk.choice_position is None else _choice_of(chunk)
                if chunk.parsed is not None:
                    more["delta"] = chunk.parsed
                self._journal.write(
                    job_id=job_id,
                    position=chunk.position,
                    ids=chunk.token_ids,
                    text=chunk.text,
                    **more,
                )
                self._seen[job_id] = chunk.position
                num_chunks += 1
                if num_chunks == drop_after and chunk.token_ids:
                    return False
                if pause_s:
                    await asyncio.sleep(pause_s)
        if ask_again:
            choices = (await self._client.attach(job_id).result()).choices
            result = [
                [each.token_ids, each.text, each.finish_reason, each.stop_reason, each.parsed]
                for each in choices
            ]
            self._journal.write(job_id=job_id, result=result)
        self._journal.write(job_id=job_id, end="finished")
        return True


def _choice_of(chunk: Chunk) -> dict[str, Any]:
    return {
        "index": chunk.index,
        "choice_position": chunk.choice_position,
        "finish_reason": chunk.finish_reason,
    }
