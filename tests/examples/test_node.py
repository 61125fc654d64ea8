"""The Node example, which shows that docs/protocol.md suffices.

Skipped if its packages cannot be installed.
"""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import redis

from ingine.contract.events import TerminalEvent, TokensEvent, encode_event
from ingine.contract.keys import Keys, keys_of
from ingine.contract.record import JobStatus
from ingine.producer import Client
from ingine.producer.submission import build_submission
from tests.examples.conftest import EXAMPLES, QUEUE
from tests.waiting import HANGS_S, wait_until

PROMPT = "Once upon a time"
LONG = {"temperature": 0, "max_tokens": 300, "ignore_eos": True}


class Ended(NamedTuple):
    status: int
    text: str
    remarks: str
    """Its standard error."""


RunNode = Callable[..., Ended]


@pytest.fixture(scope="session")
def node_example(tmp_path_factory) -> Path:
    """A copy of the example's folder and nothing else, with its packages."""
    if not shutil.which("node") or not shutil.which("npm"):
        pytest.skip("node or npm is not installed")
    folder = tmp_path_factory.mktemp("node") / "example"
    shutil.copytree(EXAMPLES / "node", folder, ignore=shutil.ignore_patterns("node_modules"))
    install = ["npm", "install", "--no-audit", "--no-fund"]
    try:
        installed = subprocess.run(install, cwd=folder, capture_output=True, text=True, timeout=HANGS_S)
    except subprocess.TimeoutExpired:
        pytest.skip(f"npm install has not ended after {HANGS_S:.0f} s: no registry within reach")
    if installed.returncode:
        pytest.skip(f"npm install failed: {installed.stderr.strip().splitlines()[-1]}")
    return folder


def test_the_example_has_our_script():
    """The example has a copy, so that its folder is all that a reader needs.

    To mend it, copy ours over it.
    """
    ours = EXAMPLES.parent / "ingine" / "contract" / "scripts" / "submit.lua"
    assert (EXAMPLES / "node" / "submit.lua").read_bytes() == ours.read_bytes()


def test_the_example_reads_nothing_outside_its_folder():
    code = "".join(path.read_text() for path in (EXAMPLES / "node").glob("*.js*"))
    assert "../" not in code


@pytest.fixture
def start(node_example, environment) -> Callable[..., subprocess.Popen]:
    """`start("stream", job_id)` starts the example. Keywords are environment variables."""

    def start(*arguments: str, **variables: str) -> subprocess.Popen:
        return subprocess.Popen(
            ["node", "main.js", *arguments],
            cwd=node_example,
            env=environment | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    return start


@pytest.fixture
def node(start) -> RunNode:
    """Like `start`, but runs the example to its end."""
    return lambda *arguments, **variables: end_of(start(*arguments, **variables))


def end_of(running: subprocess.Popen) -> Ended:
    # Not in text mode, which would make newlines of the model's carriage returns.
    text, remarks = (output.decode() for output in running.communicate(timeout=HANGS_S))
    return Ended(running.returncode, text, remarks)


def text_of(client: Client, job_id: str, from_position: int = 0) -> str:
    return "".join(chunk.text for chunk in client.attach(job_id, from_position).stream())


@pytest.mark.parametrize("how", [[], ["--checked"]], ids=["bare XADD", "submit.lua"])
def test_submit_prints_what_the_python_client_gets(node, client, how):
    ended = node("submit", *how, PROMPT)
    assert ended.status == 0, ended.remarks
    submitted, finished = ended.remarks.splitlines()
    job_id = submitted.removeprefix("job ")
    assert finished == f"finished after {client.status(job_id).position} tokens"
    assert ended.text == text_of(client, job_id) + "\n"
    # Greedy, so the same job gives the same text.
    again = client.submit(PROMPT, max_tokens=64, temperature=0).result(timeout=HANGS_S)
    assert ended.text == again.text + "\n" != "\n"


@pytest.mark.parametrize("how", ["submit", "submitChecked"])
def test_an_entry_says_how_many_choices_its_job_has(node_example, redis_url, queue, how):
    """Beside the job; the checked way also says what it costs, as the Python client does."""
    code = (
        f'import {{ connect, {how} }} from "./ingine.js";'
        "const [url, queue] = process.argv.slice(1);"
        "const redis = await connect(url);"
        "for (const n of [1, 3])"
        f'  await {how}(redis, queue, {{ prompt: "{PROMPT}", sampling: {{ n, max_tokens: 5 }} }});'
        "redis.destroy();"
    )
    command = ["node", "--input-type=module", "-e", code, redis_url, queue]
    subprocess.run(command, cwd=node_example, check=True, timeout=HANGS_S)
    with redis.Redis.from_url(redis_url) as connection:
        entries = [fields for _, fields in connection.xrange(Keys(queue).jobs("normal"))]
    assert [fields.get(b"choices") for fields in entries] == [None, b"3"]
    if how == "submitChecked":
        costs = [build_submission(PROMPT, n=n, max_tokens=5).cost for n in (1, 3)]
        assert [int(fields[b"cost"]) for fields in entries] == costs


def test_attach_to_a_job_that_runs(node, client):
    job = client.submit(PROMPT, sampling=LONG)
    wait_until(lambda: job.status().position > 3)
    ended = node("stream", job.job_id)
    assert (ended.status, ended.text) == (0, text_of(client, job.job_id) + "\n")


@pytest.mark.parametrize("position", [1, 100, 300, 10_000])
def test_resume_at_a_position(node, client, position):
    job = client.submit(PROMPT, sampling=LONG)
    job.result(timeout=HANGS_S)
    ended = node("stream", "--from", str(position), job.job_id)
    assert (ended.status, ended.text) == (0, text_of(client, job.job_id, position) + "\n")
    assert ended.remarks == "finished after 300 tokens\n"


def test_the_channel_only_wakes_it(start, client, served_url):
    """The channel of a job with `stream: false` carries only the terminal event, and any forgeries."""
    with redis.Redis.from_url(served_url) as connection:
        client.pause()
        try:
            wait_until(
                lambda: {worker["state"] for worker in client.queue_info().workers.values()} == {"paused"}
            )
            job = client.submit(PROMPT, sampling=LONG, stream=False)
            following = start("stream", job.job_id)
            channel = Keys(QUEUE).channel(job.job_id)
            wait_until(lambda: connection.pubsub_shardnumsub(channel)[0][1], what="its subscription")
            for forged in (
                TerminalEvent(0, JobStatus.FINISHED, job.job_id, "FORGED"),
                TokensEvent(1, [5], "FORGED"),
                TerminalEvent(1, JobStatus.FAILED, job.job_id, "FORGED"),
            ):
                connection.spublish(channel, encode_event(forged))
            connection.spublish(channel, b"\xc1")
        finally:
            client.resume()
        ended = end_of(following)
    assert (ended.status, ended.text) == (0, text_of(client, job.job_id) + "\n")


@pytest.mark.parametrize("how", [[], ["--checked"]], ids=["bare XADD", "submit.lua"])
def test_a_queue_with_partitions(start, served_url, how):
    """Its jobs are in the partitions where the Python client looks for them."""
    queue = f"examples-split-{len(how)}"
    with Client(served_url, queue=queue) as client, redis.Redis.from_url(served_url) as connection:
        client.set_partitions(5)
        for _ in range(3):
            following = start("submit", *how, PROMPT, INGINE_QUEUE=queue)
            job_id = following.stderr.readline().decode().strip().removeprefix("job ")
            keys = keys_of(queue, job_id, 5)
            assert connection.xlen(keys.jobs("normal")) == 1
            connection.delete(keys.jobs("normal"))
            end = TerminalEvent(position=0, status=JobStatus.CANCELLED, job_id=job_id)
            connection.xadd(keys.tokens(job_id), {"event": encode_event(end)}, id="0-1")
            assert end_of(following).remarks == "cancelled after 0 tokens\n"


def test_a_log_that_no_worker_wrote_is_an_error(node, served_url):
    with redis.Redis.from_url(served_url) as connection:
        for name, entry, event in (
            ("gap", "2-0", TokensEvent(2, [5], "x")),
            ("other", "0-1", TerminalEvent(0, JobStatus.FINISHED, "another", "x")),
            ("place", "9-0", TokensEvent(1, [5], "x")),
        ):
            connection.xadd(Keys(QUEUE).tokens(name), {"event": encode_event(event)}, id=entry)
            ended = node("stream", name)
            assert (ended.status, ended.text) == (1, "")
            assert "bad_record" in ended.remarks
        connection.hset(Keys(QUEUE).job("lost"), mapping={"status": "finished", "position": 3})
        assert "bad_record" in node("stream", "lost").remarks


def test_an_unknown_job(node):
    ended = node("stream", "no-such-job")
    assert (ended.status, ended.text) == (1, "")
    assert "no such job" in ended.remarks


def test_a_failed_job_says_why(node):
    ended = node("submit", "")
    assert ended.status == 1
    assert "failed after 0 tokens: empty_prompt" in ended.remarks


def test_a_cancelled_job(node, client):
    job = client.submit(PROMPT, sampling=LONG | {"max_tokens": 490})
    job.cancel()
    ended = node("stream", job.job_id)
    assert ended.status == 1
    assert ended.remarks.startswith("cancelled after ")


def test_a_full_queue_refuses(node, served_url):
    with Client(served_url, queue="examples-full") as client:
        client.set_limits(max_jobs=1)
        client.submit(PROMPT)
        ended = node("submit", "--checked", PROMPT, INGINE_QUEUE="examples-full")
        assert client.queue_info().waiting["normal"] == 1
    assert (ended.status, ended.text) == (1, "")
    assert "full 1" in ended.remarks


def test_no_server(node):
    ended = node("stream", "some-job", INGINE_REDIS_URL="redis://127.0.0.1:1/0")
    assert (ended.status, ended.text) == (3, "")
    assert "ECONNREFUSED" in ended.remarks


@pytest.mark.parametrize(
    "arguments", [[], ["submit"], ["stream", "a", "b"], ["stream", "a", "--from", "x"], ["-x"]]
)
def test_wrong_usage(node, arguments):
    assert node(*arguments).status == 2
