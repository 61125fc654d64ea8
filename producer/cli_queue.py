"""`ingine queue` and `ingine dead`: the operator's commands."""

import dataclasses
from typing import Annotated

import typer

from producer import Client
from producer.cli_options import AsJson, QueueName, RedisUrl, print_fields, print_json
from producer.results import DeadLetter, QueueInfo

queue_app = typer.Typer(help="Look at a queue, and steer it.", no_args_is_help=True)
dead_app = typer.Typer(help="Jobs that no worker could answer, kept with the reason.", no_args_is_help=True)

EntryId = Annotated[str, typer.Argument(help="As `ingine dead list` shows it.", show_default=False)]


@queue_app.command("show")
def show_queue(as_json: AsJson = False, redis_url: RedisUrl = None, queue: QueueName = None) -> None:
    """Depth by priority, limits, switches, workers and dead letters."""
    with Client(redis_url, queue=queue) as client:
        info = client.queue_info()
    if as_json:
        print_json(dataclasses.asdict(info))
    else:
        _print_queue(info)


@queue_app.command("pause")
def pause(redis_url: RedisUrl = None, queue: QueueName = None) -> None:
    """Let workers take no further jobs. What runs goes on; submitting stays possible."""
    with Client(redis_url, queue=queue) as client:
        client.pause()


@queue_app.command("resume")
def resume(redis_url: RedisUrl = None, queue: QueueName = None) -> None:
    """Undo `pause`."""
    with Client(redis_url, queue=queue) as client:
        client.resume()


@queue_app.command("drain")
def drain(
    worker: Annotated[str, typer.Argument(help="As `ingine queue show` names it.", show_default=False)],
    redis_url: RedisUrl = None,
    queue: QueueName = None,
) -> None:
    """Let one worker hand its jobs over to the others, and exit."""
    with Client(redis_url, queue=queue) as client:
        client.drain(worker)


@queue_app.command("limits")
def limits(
    max_jobs: Annotated[int | None, typer.Option(min=1, help="Jobs that wait or run.")] = None,
    max_job_bytes: Annotated[int | None, typer.Option(min=1, help="Size of one job.")] = None,
    as_json: AsJson = False,
    redis_url: RedisUrl = None,
    queue: QueueName = None,
) -> None:
    """Set the queue's limits, for all producers from now on, and show them."""
    with Client(redis_url, queue=queue) as client:
        client.set_limits(max_jobs=max_jobs, max_job_bytes=max_job_bytes)
        info = client.queue_info()
    print_fields({"max_jobs": info.max_jobs, "max_job_bytes": info.max_job_bytes}, as_json)


@dead_app.command("list")
def list_dead(
    limit: Annotated[int, typer.Option(min=1, help="At most so many, oldest first.")] = 100,
    as_json: AsJson = False,
    redis_url: RedisUrl = None,
    queue: QueueName = None,
) -> None:
    """One line a dead letter; with --json everything but the job itself."""
    with Client(redis_url, queue=queue) as client:
        letters = client.dead_letters(limit)
    for letter in letters:
        if as_json:
            print_json(_without_job(letter))
        else:
            typer.echo(f"{letter.entry_id}  {letter.code}  job {letter.job_id or '?'}  {letter.reason}")


@dead_app.command("show")
def show_dead(
    entry_id: EntryId, as_json: AsJson = False, redis_url: RedisUrl = None, queue: QueueName = None
) -> None:
    """Everything about one dead letter, the job as it was sent included."""
    with Client(redis_url, queue=queue) as client:
        print_fields(dataclasses.asdict(client.dead_letter(entry_id)), as_json)


@dead_app.command("requeue")
def requeue(entry_id: EntryId, redis_url: RedisUrl = None, queue: QueueName = None) -> None:
    """Put one back into its queue, as it was sent, e.g. after a limit was raised."""
    with Client(redis_url, queue=queue) as client:
        typer.echo(client.requeue(entry_id))


@dead_app.command("purge")
def purge(
    entry_ids: Annotated[list[str] | None, typer.Argument(help="Which ones.", show_default=False)] = None,
    every: Annotated[bool, typer.Option("--all", help="All of them.")] = False,
    redis_url: RedisUrl = None,
    queue: QueueName = None,
) -> None:
    """Delete dead letters for good, and print how many."""
    if bool(entry_ids) == every:
        raise typer.BadParameter("name dead letters, or give --all")
    with Client(redis_url, queue=queue) as client:
        typer.echo(client.purge(None if every else entry_ids))


def _print_queue(info: QueueInfo) -> None:
    typer.echo(f"queue {info.queue}{', paused' if info.paused else ''}")
    for priority, num_waiting in info.waiting.items():
        typer.echo(f"  {priority:<7} {num_waiting} waiting, {info.running[priority]} running")
    typer.echo(f"  limits  {info.max_jobs} jobs, {info.max_job_bytes} bytes a job")
    typer.echo(f"  dead    {info.num_dead}")
    for worker, heartbeat in info.workers.items():
        draining = ", draining" if worker in info.draining else ""
        facts = ", ".join(f"{name} {value}" for name, value in heartbeat.items() if name != "at_s")
        typer.echo(f"  worker  {worker}{draining}: {facts}")


def _without_job(letter: DeadLetter) -> dict:
    fields = dataclasses.asdict(letter)
    del fields["job"]
    return fields
