"""The command `ingine top`."""

from typing import Annotated

import typer

from ingine.cli.options import QueueName, RedisUrl


def top(
    once: Annotated[bool, typer.Option("--once", help="Print one frame and exit.")] = False,
    redis_url: RedisUrl = None,
    queue: QueueName = None,
) -> None:
    """Watch a queue live, and control it with keys.

    Shows workers, their load, KV memory and rates, the queue by priority and tenant, latencies, and the
    running jobs. Keys pause and resume the queue, drain a worker and cancel a job, each after a question; `t`
    shows the end of each job's output, and `q` quits. Without a terminal it prints one frame.
    """
    import asyncio
    import sys

    from rich.console import Console

    from ingine.producer import AsyncClient
    from ingine.top.run import print_once, run_board

    console = Console(highlight=False, markup=False, emoji=False)
    # Not console.is_terminal, which FORCE_COLOR makes True for a pipe.
    is_live = sys.stdout.isatty() and not console.is_dumb_terminal and not once

    async def show() -> None:
        async with AsyncClient(redis_url, queue=queue) as client:
            await (run_board if is_live else print_once)(client, console)

    asyncio.run(show())
