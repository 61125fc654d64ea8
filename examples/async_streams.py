"""Many streams in one process, over one connection: `python examples/async_streams.py`.

Each line of output is a finished story. The jobs run together in the worker's batch, so all of them take
about as long as the longest.
"""

import asyncio

from ingine import AsyncClient
from ingine.producer import AsyncJobHandle, ClientError

HEROES = ["a lighthouse", "two rivers", "a slow robot", "the last bee", "an old map", "a red kite"]


async def follow(job: AsyncJobHandle) -> str:
    """Return the whole text. A web service would forward each piece to its own client here."""
    pieces = []
    async for chunk in job.stream():
        pieces.append(chunk.text)
    return "".join(pieces)


async def tell(client: AsyncClient, hero: str) -> None:
    try:
        job = await client.submit(
            messages=[{"role": "user", "content": f"Tell me a short story about {hero}."}],
            max_tokens=96,
            deadline_s=120,
        )
        story = await follow(job)
    except ClientError as error:  # a full queue, a failed or expired job, no server: the message says which
        print(f"{hero}: {error}")
    else:
        print(f"{hero}: {story!r}")


async def main() -> None:
    async with AsyncClient() as client, asyncio.TaskGroup() as group:
        for hero in HEROES:
            group.create_task(tell(client, hero))


if __name__ == "__main__":
    asyncio.run(main())
