"""The commands `ingine queue` and `ingine dead`, for operators."""

import dataclasses
import re
from enum import StrEnum
from typing import Annotated

import typer

from ingine import producer
from ingine.cli.options import AsJson, QueueName, RedisUrl, print_fields, print_json
from ingine.contract.keys import MAX_PARTITIONS, SILENT_AFTER_S, Priority
from ingine.terminal import echo

queue_app = typer.Typer(help="Inspect and control a queue.", no_args_is_help=True)
dead_app = typer.Typer(help="Jobs that no worker could answer, kept with the reason.", no_args_is_help=True)


def _entry_ids(given: str | list[str] | None) -> str | list[str] | None:
    for entry_id in [given] if isinstance(given, str) else given or ():
        if not re.fullmatch(r"(\d+:)?\d+-\d+", entry_id, re.ASCII):
            raise typer.BadParameter(f"{entry_id!r} is no dead letter's id: `ingine dead list` shows them")
    return given


EntryId = Annotated[
    str, typer.Argument(help="As `ingine dead list` shows it.", show_default=False, callback=_entry_ids)
]


@queue_app.command("show")
def show_queue(as_json: AsJson = False, redis_url: RedisUrl = None, queue: QueueName = None) -> None:
    """Show depth by priority, limits, switches and workers."""
    with producer.Client(redis_url, queue=queue) as client:
        info = client.queue_info()
    if as_json:
        print_json(dataclasses.asdict(info))
    else:
        _print_queue(info)


JobsPriority = Annotated[Priority | None, typer.Option(help="Only jobs of this priority.")]
JobsTenant = Annotated[str | None, typer.Option(help="Only jobs of this tenant.")]
JobsAge = Annotated[float | None, typer.Option(min=0, help="Only jobs at least so many seconds old.")]


class ListedStatus(StrEnum):
    """The members of `ingine.contract.record.JobStatus` in which a job has not ended."""

    QUEUED = "queued"
    DELAYED = "delayed"
    RUNNING = "running"


@queue_app.command("list")
def list_jobs(
    status: Annotated[ListedStatus | None, typer.Option(help="Only jobs with this status.")] = None,
    priority: JobsPriority = None,
    tenant: JobsTenant = None,
    older_than_s: JobsAge = None,
    limit: Annotated[int, typer.Option(min=1, help="Maximum number of jobs.")] = 100,
    as_json: AsJson = False,
    redis_url: RedisUrl = None,
    queue: QueueName = None,
) -> None:
    """List jobs that wait or run. Sorted by priority and age, delayed ones last."""
    with producer.Client(redis_url, queue=queue) as client:
        jobs = client.jobs(
            status=status, priority=priority, tenant=tenant, older_than_s=older_than_s, limit=limit
        )
    for job in jobs:
        if as_json:
            print_json(dataclasses.asdict(job))
        else:
            who = f"  tenant {job.tenant}" if job.tenant else ""
            where = f"  worker {job.worker}" if job.worker else ""
            echo(f"{job.job_id or '?'}  {job.status}  {job.priority}  {job.age_s:.0f} s{who}{where}")


@queue_app.command("purge")
def purge_jobs(
    priority: JobsPriority = None,
    tenant: JobsTenant = None,
    older_than_s: JobsAge = None,
    yes: Annotated[bool, typer.Option("--yes", help="Confirm.")] = False,
    as_json: AsJson = False,
    redis_url: RedisUrl = None,
    queue: QueueName = None,
) -> None:
    """Cancel waiting jobs, and print how many. Running jobs go on."""
    if not yes:
        raise typer.BadParameter("this cancels jobs that wait, see `ingine queue list`: add --yes")
    with producer.Client(redis_url, queue=queue) as client:
        counts = client.purge_jobs(priority=priority, tenant=tenant, older_than_s=older_than_s)
    if as_json:
        return print_json(counts)
    echo(f"{counts['cancelled']} cancelled")
    if counts["requested"]:
        echo(f"{counts['requested']} had begun before, and end when a worker takes them")


@queue_app.command("pause")
def pause(redis_url: RedisUrl = None, queue: QueueName = None) -> None:
    """Make workers take no further jobs. Running jobs go on; submitting stays possible."""
    with producer.Client(redis_url, queue=queue) as client:
        client.pause()


@queue_app.command("resume")
def resume(redis_url: RedisUrl = None, queue: QueueName = None) -> None:
    """Undo `pause`."""
    with producer.Client(redis_url, queue=queue) as client:
        client.resume()


@queue_app.command("drain")
def drain(
    worker: Annotated[str, typer.Argument(help="As `ingine queue show` names it.", show_default=False)],
    redis_url: RedisUrl = None,
    queue: QueueName = None,
) -> None:
    """Make one worker hand its jobs over to others, and exit."""
    with producer.Client(redis_url, queue=queue) as client:
        client.drain(worker)


@queue_app.command("limits")
def limits(
    max_jobs: Annotated[int | None, typer.Option(min=1, help="Most jobs that wait or run.")] = None,
    max_bytes: Annotated[
        str | None, typer.Option(metavar="BYTES", help="Most bytes of jobs that wait or run, such as 2GiB.")
    ] = None,
    max_job_bytes: Annotated[
        str | None, typer.Option(metavar="BYTES", help="Largest size of one job.")
    ] = None,
    max_jobs_per_s: Annotated[
        float | None, typer.Option(min=0, help="Most submissions of one tenant; 0: no limit.")
    ] = None,
    weight: Annotated[
        list[str] | None,
        typer.Option(metavar="TENANT=WEIGHT", help="A tenant's share; others have 1. May be repeated."),
    ] = None,
    as_json: AsJson = False,
    redis_url: RedisUrl = None,
    queue: QueueName = None,
) -> None:
    """Set limits, and show them. They apply to all producers from now on, in each partition separately."""
    with producer.Client(redis_url, queue=queue) as client:
        try:
            client.set_limits(
                max_jobs=max_jobs,
                max_bytes=max_bytes,
                max_job_bytes=max_job_bytes,
                max_jobs_per_s=max_jobs_per_s,
                weights=dict(_parse_weight(given) for given in weight or ()),
            )
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
        info = client.queue_info()
    names = ("max_jobs", "max_bytes", "max_job_bytes", "max_jobs_per_s", "weights", "num_partitions")
    print_fields({name: getattr(info, name) for name in names}, as_json)


def _parse_weight(given: str) -> tuple[str, float]:
    tenant, _, weight = given.rpartition("=")
    try:
        return tenant, float(weight)
    except ValueError:
        raise typer.BadParameter(f"{given!r} is not TENANT=WEIGHT", param_hint="--weight") from None


@queue_app.command("partition")
def partition(
    number: Annotated[
        int, typer.Argument(min=1, max=MAX_PARTITIONS, help="Number of partitions.", show_default=False)
    ],
    redis_url: RedisUrl = None,
    queue: QueueName = None,
) -> None:
    """Spread a queue over several partitions. The nodes of a cluster share them.

    The queue has to be empty, of dead letters too. Results of ended jobs cannot be read afterwards. Workers
    exit, and have to be started again.
    """
    with producer.Client(redis_url, queue=queue) as client:
        client.set_partitions(number)


@dead_app.command("list")
def list_dead(
    limit: Annotated[int, typer.Option(min=1, help="Maximum number of letters, oldest first.")] = 100,
    as_json: AsJson = False,
    redis_url: RedisUrl = None,
    queue: QueueName = None,
) -> None:
    """List dead letters, one per line. With --json, everything except the job itself."""
    with producer.Client(redis_url, queue=queue) as client:
        letters = client.dead_letters(limit)
    for letter in letters:
        if as_json:
            print_json(_without_job(letter))
        else:
            echo(f"{letter.entry_id}  {letter.code}  job {letter.job_id or '?'}  {letter.reason}")


@dead_app.command("show")
def show_dead(
    entry_id: EntryId, as_json: AsJson = False, redis_url: RedisUrl = None, queue: QueueName = None
) -> None:
    """Show one dead letter, including the job as it was sent."""
    with producer.Client(redis_url, queue=queue) as client:
        print_fields(dataclasses.asdict(client.dead_letter(entry_id)), as_json)


@dead_app.command("requeue")
def requeue(entry_id: EntryId, redis_url: RedisUrl = None, queue: QueueName = None) -> None:
    """Put a dead letter back into its queue, as it was sent. For example after a limit was raised."""
    with producer.Client(redis_url, queue=queue) as client:
        echo(client.requeue(entry_id))


@dead_app.command("purge")
def purge(
    entry_ids: Annotated[
        list[str] | None, typer.Argument(help="Which to delete.", show_default=False, callback=_entry_ids)
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Delete all dead letters.")] = False,
    redis_url: RedisUrl = None,
    queue: QueueName = None,
) -> None:
    """Delete dead letters for good, and print how many."""
    if bool(entry_ids) == every:
        raise typer.BadParameter("name dead letters, or give --all")
    with producer.Client(redis_url, queue=queue) as client:
        echo(client.purge(None if every else entry_ids))


def _print_queue(info: "producer.QueueInfo") -> None:
    from ingine.producer.results import NO_WORKER

    partitions = f", {info.num_partitions} partitions" if info.num_partitions > 1 else ""
    echo(f"queue {info.queue}{partitions}{', paused' if info.paused else ''}")
    for priority, num_waiting in info.waiting.items():
        echo(f"  {priority:<7} {num_waiting} waiting, {info.running[priority]} running")
    echo(f"  delayed {info.num_delayed}")
    echo(f"  bytes   {info.num_bytes}")
    rate = f", {info.max_jobs_per_s:g} jobs/s a tenant" if info.max_jobs_per_s else ""
    each = ", each partition" if info.num_partitions > 1 else ""
    jobs = f"{info.max_jobs} jobs, {info.max_bytes} bytes, {info.max_job_bytes} bytes a job"
    echo(f"  limits  {jobs}{rate}{each}")
    for tenant, weight in info.weights.items():
        echo(f"  weight  {tenant} {weight:g}")
    echo(f"  dead    {info.num_dead}")
    echo(f"  serving {info.num_serving} of {len(info.workers)} workers")
    for worker, heartbeat in info.workers.items():
        draining = ", draining" if worker in info.draining else ""
        state = heartbeat.get("state", "?")
        if heartbeat["silent_s"] > SILENT_AFTER_S:
            state += f" (no heartbeat for {heartbeat['silent_s']} s)"
        facts = ", ".join(
            f"{name} {value}"
            for name, value in heartbeat.items()
            if name not in ("at_s", "state", "silent_s")
        )
        echo(f"  worker  {worker}{draining}: {state}{', ' if facts else ''}{facts}")
    if info.num_serving == 0:
        echo(f"ingine: {NO_WORKER % repr(info.queue)}", err=True)


def _without_job(letter: "producer.DeadLetter") -> dict:
    fields = dataclasses.asdict(letter)
    del fields["job"]
    return fields
