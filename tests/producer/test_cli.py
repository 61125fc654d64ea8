"""The producer's commands, as processes: output, exit status, one clear line for an error."""

import asyncio
import json
import signal
from collections.abc import AsyncIterator

import msgpack
import pytest
import typer.main
from redis.asyncio import Redis
from typer.testing import CliRunner

from ingine.cli.main import app
from ingine.contract.jobs import Job, decode_job
from ingine.contract.keys import Keys
from ingine.contract.record import JobStatus
from tests.producer.conftest import Ingine, Server, start
from tests.producer.fake_worker import FakeWorker
from tests.producer.test_choices import ENDS, commit


@pytest.fixture
async def redis(valkey: Server) -> AsyncIterator[Redis]:
    async with valkey.connect() as connection:
        yield connection


async def queued(redis: Redis, keys: Keys, priority: str = "normal") -> Job:
    [(_, fields)] = await redis.xrange(keys.jobs(priority))
    return decode_job(fields[b"job"])


async def test_submit_prints_the_job_id(ingine: Ingine, redis: Redis, keys: Keys):
    finished = await ingine(
        *("submit", "--raw", "hi there", "--max-tokens", "7", "--stop", "a", "--stop", "b", "--seed", "3"),
        *("--priority", "high", "--deadline-s", "2.5", "--job-id", "mine"),
    )
    assert finished == (0, "mine\n", "")
    job = await queued(redis, keys, "high")
    assert (job.id, job.prompt, job.deadline_ms) == ("mine", "hi there", 2500)
    assert (job.sampling.max_tokens, job.sampling.stop, job.sampling.seed) == (7, ("a", "b"), 3)


async def test_a_prompt_can_be_piped_in(ingine: Ingine, redis: Redis, keys: Keys):
    finished = await ingine("submit", "--json", stdin="two\nlines\n")
    job = await queued(redis, keys)
    assert json.loads(finished.stdout) == {"job_id": job.id}
    assert [message.model_dump(exclude_none=True) for message in job.messages] == [
        {"role": "user", "content": "two\nlines"}
    ]


async def test_an_empty_input_is_no_prompt(ingine: Ingine, redis: Redis, keys: Keys):
    for stdin in ("", "\n", " \n\n"):
        refused = await ingine("submit", stdin=stdin)
        assert refused.exit_status == 2
        assert "standard input is empty" in refused.stderr
    assert await redis.xlen(keys.jobs("normal")) == 0


async def test_submit_and_stream(ingine: Ingine, worker: FakeWorker):
    running = asyncio.create_task(ingine("submit", "--raw", "--stream", stdin="prompt\n"))
    job = await worker.take()
    assert job.prompt == "prompt"
    await worker.run(job.id, 3, text="!", finish_reason="stop")
    assert await running == (0, "<1><2><3>!\n", "")


async def test_output_that_length_has_cut_says_so_on_stderr(ingine: Ingine, worker: FakeWorker):
    await ingine("submit", "hi", "--job-id", "mine")
    await worker.take()
    await worker.run("mine", 3, finish_reason="length")
    for form in ((), ("--json",), ("--from", "3")):
        finished = await ingine("stream", "mine", *form)
        assert finished.exit_status == 0
        assert finished.stderr == "ingine: the output was cut at 3 tokens (finish_reason: length)\n"


async def test_stream_from_a_position_as_json(ingine: Ingine, worker: FakeWorker):
    await ingine("submit", "hi", "--job-id", "mine")
    await worker.take()
    await worker.run("mine", 3)
    finished = await ingine("stream", "mine", "--from", "1", "--json")
    assert [json.loads(line) for line in finished.stdout.splitlines()] == [
        {"position": 2, "token_ids": [2], "text": "<2>"},
        {"position": 3, "token_ids": [3], "text": "<3>"},
    ]


async def test_a_failed_job_is_one_line_and_exit_status_1(ingine: Ingine, worker: FakeWorker):
    await ingine("submit", "hi", "--job-id", "mine")
    await worker.take()
    await worker.commit("mine", 0, 1)
    await worker.end("mine", 1, JobStatus.FAILED, error={"code": "engine_error", "message": "a cosmic ray"})
    finished = await ingine("stream", "mine")
    assert finished == (1, "<1>\n", "ingine: job mine failed: a cosmic ray\n")


async def test_ctrl_c_leaves_the_job_alone_and_says_how_to_go_on(worker: FakeWorker, where: list[str]):
    process = await start("submit", "hi", "--stream", *where)
    job = await worker.take()
    await worker.commit(job.id, 0, 2)
    assert await process.stdout.readexactly(6) == b"<1><2>"
    process.send_signal(signal.SIGINT)
    _, said = await process.communicate()
    assert process.returncode == 130
    assert f"ingine stream {job.id} --from 2" in said.decode()
    assert b"Traceback" not in said
    assert not await worker.redis.hexists(worker.keys.job(job.id), "cancel")


async def test_status_and_cancel(ingine: Ingine):
    await ingine("submit", "hi", "--job-id", "mine")
    assert json.loads((await ingine("status", "mine", "--json")).stdout)["status"] == "queued"
    assert (await ingine("cancel", "mine")).stdout == "cancelled\n"
    assert json.loads((await ingine("cancel", "mine", "--json")).stdout) == {
        "job_id": "mine",
        "outcome": "cancelled",
    }
    shown = (await ingine("status", "mine")).stdout
    assert "status:            cancelled\n" in shown
    assert await ingine("status", "nobody") == (
        1, "", "ingine: no job nobody: never submitted, or its result's TTL has passed\n",
    )  # fmt: skip


async def test_queue(ingine: Ingine, redis: Redis, keys: Keys):
    await ingine("submit", "hi", "--priority", "low")
    now_s, _ = await redis.time()
    await redis.hset(keys.workers, "w1", msgpack.packb({"state": "running", "at_s": now_s + 3600}))
    limits = await ingine("queue", "limits", "--max-jobs", "1", "--max-jobs-per-s", "2.5", "--json")
    assert json.loads(limits.stdout) == {
        "max_jobs": 1,
        "max_bytes": 1 << 30,
        "max_job_bytes": 1 << 20,
        "max_jobs_per_s": 2.5,
        "weights": {},
        "num_partitions": 1,
    }
    assert "{'big': 3.0}" in (await ingine("queue", "limits", "--weight", "big=3")).stdout
    for wrong in ("big", "big=much", "big=0", "a tenant=1"):
        assert (await ingine("queue", "limits", "--weight", wrong)).exit_status == 2
    assert (await ingine("queue", "pause")).exit_status == 0
    assert (await ingine("queue", "drain", "w1")).exit_status == 0
    shown = (await ingine("queue", "show")).stdout
    assert f"queue {keys.queue}, paused\n" in shown
    assert "low     1 waiting, 0 running\n" in shown
    assert "limits  1 jobs, 1073741824 bytes, 1048576 bytes a job, 2.5 jobs/s a tenant\n" in shown
    assert "weight  big 3\n" in shown
    assert "serving 1 of 1 workers\n" in shown
    assert "w1, draining: running\n" in shown
    full = await ingine("submit", "one too many")
    assert full.exit_status == 1
    assert "at its limit of 1 jobs" in full.stderr
    assert (await ingine("queue", "resume")).exit_status == 0
    assert not json.loads((await ingine("queue", "show", "--json")).stdout)["paused"]


async def test_waiting_jobs_are_listed_and_purged(ingine: Ingine):
    await ingine("submit", "hi", "--job-id", "mine", "--tenant", "t")
    await ingine("submit", "hi", "--job-id", "later", "--not-before-s", "3600")
    mine, later = (await ingine("queue", "list")).stdout.splitlines()
    assert mine.startswith("mine  queued  normal  ") and mine.endswith("s  tenant t")
    assert later.startswith("later  delayed  normal  ")
    listed = await ingine("queue", "list", "--status", "delayed", "--json")
    assert json.loads(listed.stdout)["job_id"] == "later"
    unsure = await ingine("queue", "purge")
    assert (unsure.exit_status, unsure.stdout) == (2, "")
    assert "--yes" in unsure.stderr
    assert await ingine("queue", "purge", "--tenant", "t", "--yes") == (0, "1 cancelled\n", "")
    purged = await ingine("queue", "purge", "--yes", "--json")
    assert json.loads(purged.stdout) == {"cancelled": 1, "requested": 0}
    shown = await ingine("queue", "show")
    assert "serving 0 of 0 workers\n" in shown.stdout
    assert shown.stderr.startswith("ingine: no worker serves queue ")


async def test_dead_letters(ingine: Ingine, redis: Redis, keys: Keys):
    fields = {"job": b"\xc1\x00", "code": "not_msgpack", "reason": "bad bytes", "stream": keys.jobs("high")}
    letter = fields | {"entry": "1-0", "deliveries": 1, "worker": "w1"}
    first, second, third = [(await redis.xadd(keys.dead, letter)).decode() for _ in range(3)]
    listed = (await ingine("dead", "list")).stdout.splitlines()
    assert listed[0] == f"{first}  not_msgpack  job ?  bad bytes"
    assert len((await ingine("dead", "list", "--json", "--limit", "2")).stdout.splitlines()) == 2
    assert r"\xc1" in (await ingine("dead", "show", first)).stdout
    assert json.loads((await ingine("dead", "show", first, "--json")).stdout)["deliveries"] == 1
    assert (await ingine("dead", "requeue", first)).exit_status == 0
    assert await redis.xlen(keys.jobs("high")) == 1
    assert (await ingine("dead", "purge", second)).stdout == "1\n"
    assert (await ingine("dead", "purge")).exit_status == 2
    assert (await ingine("dead", "purge", third, "--all")).exit_status == 2
    assert (await ingine("dead", "purge", "--all")).stdout == "1\n"
    assert (await ingine("dead", "show", third)).exit_status == 1


@pytest.mark.parametrize("command", ["show", "requeue", "purge"])
def test_what_is_no_dead_letters_id_is_wrong_usage(command: str):
    result = CliRunner().invoke(app, ["dead", command, "x-1"], env={"COLUMNS": "100"})
    assert result.exit_code == 2 and "`ingine dead list` shows them" in result.output


@pytest.mark.parametrize(
    ("arguments", "exit_status", "says"),
    [
        (["submit", "hi", "--max-tokens", "0"], 2, "sampling.max_tokens"),
        (["submit", "hi", "--priority", "urgent"], 2, "urgent"),
        (["submit", "hi", "--nonsense"], 2, "nonsense"),
        (
            ["submit", "hi", "--redis-url", "http://x"],
            2,
            "INGINE_REDIS_URL (--redis-url): must begin with redis://",
        ),
        (["submit", "hi", "--redis-url", "redis://127.0.0.1:1/0"], 3, "127.0.0.1:1 cannot be reached"),
        (["batch", "missing.jsonl", "-o", "out.jsonl"], 2, "missing.jsonl is not a file"),
    ],
)
async def test_errors_are_one_line_and_an_exit_status(arguments: list[str], exit_status: int, says: str):
    process = await start(*arguments)
    stdout, stderr = await process.communicate()
    assert process.returncode == exit_status
    assert stdout == b""
    assert says in stderr.decode()
    assert "Traceback" not in stderr.decode()


@pytest.mark.parametrize(
    "command",
    [
        *("submit", "stream", "batch", "status", "cancel", "queue", "dead"),
        *(
            f"queue {name}"
            for name in ("show", "list", "purge", "pause", "resume", "drain", "limits", "partition")
        ),
        *(f"dead {name}" for name in ("list", "show", "requeue", "purge")),
    ],
)
def test_every_command_explains_itself(command: str):
    """Help describes the command, and each of its options and arguments."""
    shown = CliRunner().invoke(app, [*command.split(), "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert shown.exit_code == 0
    assert f"{command} [OPTIONS]" in shown.output
    found = typer.main.get_command(app)
    for name in command.split():
        found = found.commands[name]
    assert found.help and found.help.split()[0] in shown.output
    for parameter in found.params:
        assert parameter.name == "help" or getattr(parameter, "help", None), f"{parameter.name} says nothing"
        for option in parameter.opts if parameter.param_type_name == "option" else ():
            assert option in shown.output
    for name, subcommand in getattr(found, "commands", {}).items():
        assert name in shown.output and subcommand.help


async def test_several_outputs_are_printed_when_all_have_ended(ingine: Ingine, worker: FakeWorker):
    finished = await ingine("submit", "hi", "--n", "2", "--job-id", "two")
    assert finished == (0, "two\n", "")
    assert (await worker.take()).sampling.n == 2
    await commit(worker, "two", [0, 1, 1, 0])
    await worker.end("two", 4, choices=ENDS)
    finished = await ingine("stream", "two")
    assert finished.stdout == "[0]\n<1><2>\n[1]\n<11><12>held\n"
    assert finished.stderr == "ingine: output 0 was cut at 2 tokens (finish_reason: length)\n"
    finished = await ingine("stream", "two", "--json")
    chunks = [json.loads(line) for line in finished.stdout.splitlines()]
    assert [(chunk["index"], chunk.get("choice_position")) for chunk in chunks] == [
        (0, 1),
        (1, 1),
        (1, 2),
        (0, 2),
        (1, 2),
    ]
