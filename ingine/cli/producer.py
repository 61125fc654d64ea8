"""The commands of a producer. Each imports what it needs when run, so `ingine --help` loads no client."""

import dataclasses
import sys
from typing import Annotated, Any

import typer

from ingine import producer
from ingine.cli.batch import batch
from ingine.cli.chat_options import Schema, ToolChoice, Tools, chat_fields, with_schema
from ingine.cli.message_output import MessagePrinter, print_choice, print_tool_calls
from ingine.cli.options import (
    INTERRUPTED,
    AsJson,
    QueueName,
    RedisUrl,
    Sampling,
    print_fields,
    print_json,
    sampling_fields,
)
from ingine.cli.queue import dead_app, queue_app
from ingine.contract.keys import Priority
from ingine.terminal import echo

JobId = Annotated[str, typer.Argument(help="The id that `submit` printed.", show_default=False)]


def register(app: typer.Typer) -> None:
    for command in (submit, stream, batch, status, cancel):
        app.command()(command)
    app.add_typer(queue_app, name="queue")
    app.add_typer(dead_app, name="dead")


def submit(
    prompt: Annotated[str | None, typer.Argument(help="The prompt. Default: standard input.")] = None,
    follow: Annotated[bool, typer.Option("--stream", help="Print the output as it is generated.")] = False,
    chat: Annotated[
        bool,
        typer.Option("--chat/--raw", help="Apply the model's chat template to the prompt, or use it as is."),
    ] = True,
    n: Annotated[
        int | None,
        typer.Option(
            help="Number of outputs. --stream prints several when all have ended, or chunks with --json."
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(help="Maximum number of output tokens. Default: the rest of the model's length."),
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus sampling.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Keep the k likeliest tokens.")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same output.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop before this text. May be repeated.")] = None,
    sampling: Sampling = None,
    schema: Schema = None,
    tools: Tools = None,
    tool_choice: ToolChoice = None,
    priority: Annotated[Priority, typer.Option(help="Jobs of higher priority go first.")] = Priority.NORMAL,
    deadline_s: Annotated[float | None, typer.Option(help="Expire unless finished by then.")] = None,
    not_before_s: Annotated[float | None, typer.Option(help="Start the job no earlier.")] = None,
    tenant: Annotated[str | None, typer.Option(help="The account, for fair shares and rate limits.")] = None,
    idempotency_key: Annotated[str | None, typer.Option(help="Same key, same job, while it is kept.")] = None,
    reply_to: Annotated[str | None, typer.Option(help="Replies stream for the terminal event.")] = None,
    model: Annotated[str | None, typer.Option(help="Refused by workers that serve another.")] = None,
    job_id: Annotated[str | None, typer.Option(help="An id of your own. Default: a random one.")] = None,
    as_json: AsJson = False,
    redis_url: RedisUrl = None,
    queue: QueueName = None,
) -> None:
    """Submit one job, and print its id; with --stream, its output.

    Content is printed on standard output, behind it each call of a function as a line of JSON, and reasoning
    on standard error. With --json each chunk is a line, and has the delta of the message where there is one.

    Sampling options that are not given come from the model's generation_config.json, else they have vLLM's
    neutral values, such as temperature 1.

    Exit status: 0 accepted (with --stream: finished), 1 refused by the queue, failed, cancelled or expired,
    2 wrong usage or invalid job, 3 server unavailable.
    """
    prompt = _from_stdin() if prompt is None else prompt
    fields = sampling_fields(
        sampling,
        n=n,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        stop=stop or None,
    )
    fields = with_schema(fields, schema)
    of_chat = chat_fields(tools, tool_choice, chat=chat)
    with producer.Client(redis_url, queue=queue) as client:
        job = client.submit(
            None if chat else prompt,
            messages=[{"role": "user", "content": prompt}] if chat else None,
            **of_chat,
            sampling=fields,
            priority=priority,
            deadline_s=deadline_s,
            not_before_s=not_before_s,
            tenant=tenant,
            idempotency_key=idempotency_key,
            reply_to=reply_to,
            model=model,
            job_id=job_id,
        )
        if follow:
            _print_stream(job, as_json)
        elif as_json:
            print_json({"job_id": job.job_id})
        else:
            echo(job.job_id)


def stream(
    job_id: JobId,
    from_position: Annotated[int, typer.Option("--from", min=0, help="Start after this many tokens.")] = 0,
    as_json: AsJson = False,
    redis_url: RedisUrl = None,
    queue: QueueName = None,
) -> None:
    """Print a job's output from any position on, past and future. With --json, one chunk per line.

    Exit status: 0 finished, 1 failed, cancelled, expired or unknown, 2 wrong usage, 3 server unavailable.
    """
    with producer.Client(redis_url, queue=queue) as client:
        _print_stream(client.attach(job_id, from_position), as_json)


def status(
    job_id: JobId, as_json: AsJson = False, redis_url: RedisUrl = None, queue: QueueName = None
) -> None:
    """Show the state of a job. Exit status 1 if there is no such job."""
    with producer.Client(redis_url, queue=queue) as client:
        print_fields(dataclasses.asdict(client.status(job_id)), as_json)


def cancel(
    job_id: JobId, as_json: AsJson = False, redis_url: RedisUrl = None, queue: QueueName = None
) -> None:
    """Cancel a job. Prints `cancelled`, `requested` (its worker will stop it), or how it had ended before."""
    with producer.Client(redis_url, queue=queue) as client:
        outcome = client.cancel(job_id)
    if as_json:
        print_json({"job_id": job_id, "outcome": outcome})
    else:
        echo(outcome)


def _from_stdin() -> str:
    if sys.stdin.isatty():
        raise typer.BadParameter("give a prompt, or pipe one in", param_hint="PROMPT")
    prompt = sys.stdin.read().removesuffix("\n")
    if not prompt.strip():
        raise typer.BadParameter("standard input is empty", param_hint="PROMPT")
    return prompt


def _print_stream(job: "producer.JobHandle", as_json: bool) -> None:
    position, printer = job.from_position, MessagePrinter()
    try:
        from ingine.producer.openai.responses import FINISH_LENGTH

        for chunk in job.stream():
            position = chunk.position
            if as_json:
                print_json(_chunk_fields(chunk))
            elif chunk.choice_position is None:
                printer.add(chunk.delta)
        result = job.result()
    except KeyboardInterrupt:
        echo(err=True)
        echo(
            f"ingine: the job goes on. Follow it: ingine stream {job.job_id} --from {position}; "
            f"stop it: ingine cancel {job.job_id}",
            err=True,
        )
        raise typer.Exit(INTERRUPTED) from None
    finally:
        printer.end_line()
    if len(result.choices) == 1 and not as_json:
        print_tool_calls(result.message)
    elif not as_json:
        for choice in result.choices:
            print_choice(choice.index, choice.message)
    for choice in result.choices:
        if choice.finish_reason == FINISH_LENGTH:
            which = f"output {choice.index}" if len(result.choices) > 1 else "the output"
            num_tokens = len(choice.token_ids)
            echo(f"ingine: {which} was cut at {num_tokens} tokens (finish_reason: length)", err=True)


def _chunk_fields(chunk: "producer.Chunk") -> dict[str, Any]:
    names = ["position", "token_ids", "text", "logprobs", "prompt_logprobs"]
    if chunk.choice_position is not None:
        names += ["index", "choice_position", "finish_reason"]
    fields = {name: getattr(chunk, name) for name in names} | {"delta": chunk.parsed}
    return {name: value for name, value in fields.items() if value is not None}
