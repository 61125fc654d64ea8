"""An engine in a process of its own: what comes out is the same, and what breaks costs no token."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from redis import Redis

import ingine.cli.worker
import ingine.worker.hosting.engine_process
from ingine.contract.jobs import Job, encode_job
from ingine.contract.record import JobStatus
from ingine.engine.config import EngineConfig
from ingine.engine.engine import Engine
from ingine.engine.outputs import FinishReason, SeqOutput
from ingine.engine.request import EngineRequest
from ingine.errors import EngineError, ErrorCode, InvalidRequest, ModelNotFound
from ingine.message import Message, MessageDelta, ToolCall, ToolCallDelta
from ingine.sampling_params import SamplingParams
from ingine.worker.child import Child
from ingine.worker.hosting.engine_child import EXIT_ORPHANED, command
from ingine.worker.hosting.engine_link import EngineFailure
from ingine.worker.hosting.engine_process import EngineProcess
from ingine.worker.hosting.pipe import (
    make_unpacker,
    pack,
    pack_error,
    pack_outputs,
    pack_request,
    pack_stats,
    unpack_error,
    unpack_outputs,
    unpack_request,
)
from ingine.worker.settings import WorkerSettings
from tests.waiting import HANGS_S, wait_until, wait_until_async
from tests.worker import engine_program
from tests.worker.test_failures import status
from tests.worker.test_message_jobs import PARSERS, WHOLE, check_choices, check_one, said
from tests.worker.test_worker import ENDLESS, GREEDY, alone


@pytest.fixture
def failing_engine(tiny_model) -> EngineProcess:
    """Its steps fail as the ids of their sequences say."""
    return engine_program.start(str(tiny_model))


def is_gone(pid: int) -> bool:
    """True if the process has ended, even if its exit status was not read."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def child_of(pid: int, *, running: str) -> int:
    """Linux only."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    (found,) = [child for child in children if running in Path(f"/proc/{child}/cmdline").read_text()]
    return int(found)


# ------------------------------------------------------------------------------------------- as the thread


async def test_what_comes_out_is_what_the_engine_makes(harness, tiny_engine, tiny_model, monkeypatch):
    """The program is the one that `ingine worker` starts where there may be a GPU."""
    monkeypatch.setattr(ingine.cli.worker, "NVIDIA_DEVICES", (os.devnull,))
    options = {"dtype": "float32", "max_num_seqs": 4, "kv_cache_bytes": 8 << 20}
    engine, _ = ingine.cli.worker.build_engine(
        WorkerSettings(_env_file=None, model=str(tiny_model), **options)
    )
    os.kill(engine.pid, signal.SIGTERM)  # as a service manager may: it is the worker's to answer
    assert engine.model_type == tiny_engine().model_config.model_type == "llama"
    here = await harness(engine, **PARSERS)
    jobs = {
        "greedy": SamplingParams(temperature=0, max_tokens=24, ignore_eos=True),
        "dice": SamplingParams(seed=7, top_p=0.9, max_tokens=24, stop_token_ids=(3,), logprobs=2),
        "bias": SamplingParams(temperature=0, max_tokens=24, logit_bias={65: 100.0}, stop_token_ids=(65,)),
    }
    for job_id, sampling in jobs.items():
        await here.push(Job(id=job_id, prompt="Once", sampling=sampling))
    await here.push(Job(id="too-long", prompt="x" * 600))
    chat, chats = said(WHOLE, job_id="chat"), said(WHOLE, job_id="chats", sampling={"n": 2})
    await here.push(chat)
    await here.push(chats)
    check_one(chat, await here.events("chat"), WHOLE)
    assert [message["content"] for message in check_choices(chats, await here.events("chats"))] == ["So"] * 2
    for job_id, sampling in jobs.items():
        token_ids, text = alone(tiny_engine(), Job(id=job_id, prompt="Once", sampling=sampling))
        events = await here.events(job_id)
        assert [token_id for event in events[:-1] for token_id in event.token_ids] == token_ids
        assert "".join(event.text for event in events) == text
    assert (await here.end("bias")).finish_reason == "stop"
    assert all(len(event.logprobs[0]["top"]) == 2 for event in (await here.events("dice"))[:-1])
    assert (await here.end("too-long")).error["code"] == ErrorCode.PROMPT_TOO_LONG
    assert here.worker._status.heartbeat()["num_running"] == 0
    await here.stop()
    engine.close()
    assert engine._popen.returncode == 0


async def test_culprits_are_found_and_a_broken_engine_ends_the_worker(harness, failing_engine):
    here = await harness(failing_engine)
    names = ["a", "b", "poison", "c"]
    for name in names:
        await here.push(Job(id=name, prompt=name, sampling=GREEDY))
    ends = {name: await here.end(name) for name in names}
    assert ends.pop("poison").error["code"] == ErrorCode.WORKER_LOST
    assert {end.status for end in ends.values()} == {JobStatus.FINISHED}
    assert {end.timings["attempts"] for end in ends.values()} == {1}

    await here.push(Job(id="late", prompt="x", sampling=ENDLESS, deadline_ms=200))
    assert (await here.end("late")).status is JobStatus.EXPIRED  # by an abort

    for name in ("broken-1", "broken-2"):
        await here.push(Job(id=name, prompt="x", sampling=ENDLESS))
    with pytest.raises(EngineError, match="the model broke"):
        await here.running
    assert not here.worker._engine.alive
    heir = await harness()
    assert {(await heir.end(name)).position for name in ("broken-1", "broken-2")} == {450}


async def test_the_process_is_told_whose_a_sequence_is(failing_engine):
    delivered = []
    await failing_engine.start(delivered.append)
    for seq_id, tenant in {"a": "poison", "b": "b"}.items():
        failing_engine.add(EngineRequest(seq_id, [65], GREEDY, arrival_time=0.0, tenant=tenant))

    def ended() -> bool:
        failing_engine.credit()
        return bool(delivered) and failing_engine.suspects == []

    await wait_until_async(ended, what="the end of both")
    failures = [message.seq_ids for message in delivered if isinstance(message, EngineFailure)]
    assert failures == [["a"]]


@pytest.mark.parametrize("wrong", [{"min_tokens": 9, "max_tokens": 3}, {"temperature": -1.0}])
async def test_parameters_that_the_process_cannot_read_fail_their_sequence_alone(failing_engine, wrong):
    delivered = []
    await failing_engine.start(delivered.append)
    for seq_id, params in {"wrong": GREEDY.model_copy(update=wrong), "right": GREEDY}.items():
        failing_engine.add(EngineRequest(seq_id, [65], params, arrival_time=0.0))

    def ended() -> bool:
        failing_engine.credit()
        return not failing_engine.alive or failing_engine.suspects == []

    await wait_until_async(ended, what="the end of the other one")
    assert failing_engine.alive
    [failure] = [message for message in delivered if isinstance(message, EngineFailure)]
    assert (failure.seq_ids, failure.fatal) == (["wrong"], False)
    assert failure.error.code is ErrorCode.INVALID_PARAMETER
    assert delivered[-1][-1].finish_reason is not None
    failing_engine.close()


# --------------------------------------------------------------------------------------- what dies or hangs


async def test_a_step_that_kills_its_process_costs_no_token(harness, failing_engine):
    """A segmentation fault or the out-of-memory killer does so. `events` checks the log for gaps."""
    here = await harness(failing_engine)
    for name in ("a", "b", "deadly"):
        await here.push(Job(id=name, prompt=name, sampling=ENDLESS))
    with pytest.raises(EngineError, match="was killed by SIGKILL"):
        await here.running
    for name in ("a", "b", "deadly"):
        assert await status(here, name) == "delayed"
        assert await here.redis.hget(here.keys.job(name), "deaths") == b"1"
    heir = await harness()
    assert {(await heir.end(name)).position for name in ("a", "b", "deadly")} == {450}


async def test_a_step_that_hangs_ends_the_worker_and_its_process(harness, failing_engine, monkeypatch):
    """This includes a step that holds the interpreter, so that its process can send nothing."""
    monkeypatch.setattr(ingine.worker.hosting.engine_process, "SILENCE_S", 5.0)
    monkeypatch.setattr(ingine.worker.hosting.engine_process, "END_TIMEOUT_S", 0.2)
    engine = failing_engine
    here = await harness(engine, step_timeout_s=4.0, drain_timeout_s=0.4)
    await here.push(Job(id="hang", prompt="x", sampling=ENDLESS))
    with pytest.raises(EngineError, match="hangs"):
        await here.running
    assert await status(here, "hang") == "delayed"
    assert await here.redis.hget(here.keys.job("hang"), "deaths") == b"1"
    engine.close()
    assert is_gone(engine.pid)


@pytest.mark.skipif(sys.platform != "linux", reason="a signal at the parent's death is Linux's")
async def test_an_engine_ends_with_a_worker_that_is_killed(harness, tiny_model, redis_url, keys, tmp_path):
    """The kill comes in the middle of a step that holds the interpreter."""
    settings = {"redis_url": redis_url, "queue": keys.queue, "http_port": "-1", "lease_s": "1"}
    env = os.environ | {f"INGINE_{name.upper()}": value for name, value in settings.items()}
    program = [sys.executable, "-m", "tests.worker.engine_program", "worker", str(tiny_model)]
    with (tmp_path / "worker.log").open("wb") as log, Redis.from_url(redis_url) as redis:
        job = encode_job(Job(id="hang", prompt="x", sampling=ENDLESS))
        redis.xadd(keys.jobs("normal"), {"job": job})
        lost = Child(program, output=log, env=env)
        try:
            wait_until(lambda: redis.hget(keys.job("hang"), "position"), what="the token before the step")
            engine_pid = child_of(lost.pid, running="engine_program\0engine")
        finally:
            lost.kill()
            lost.stop()
    wait_until(lambda: is_gone(engine_pid), what="the end of the engine's process")
    heir = await harness()
    end = await heir.end("hang")
    assert (end.position, end.timings["attempts"]) == (450, 2)


async def test_a_process_says_how_it_is_and_leaves_with_its_connection(failing_engine):
    heard, receive, delivered = [], failing_engine._receive, []

    def listen(message):
        heard.append(message[0])
        receive(message)

    failing_engine._receive = listen
    await failing_engine.start(delivered.append)
    failing_engine.add(EngineRequest("a", [65], GREEDY, arrival_time=0.0))
    assert failing_engine.suspects == ["a"]

    def ended() -> bool:
        failing_engine.credit()
        return bool(delivered) and delivered[-1][-1].finish_reason is not None

    await wait_until_async(ended, what="the end of a sequence")
    assert failing_engine.suspects == []
    await wait_until_async(lambda: heard.count("pulse") >= 2, what="its pulse")
    receive(["pulse", 7.5, pack_stats(failing_engine.stats)])
    assert failing_engine.step_age_s == 7.5
    receive(["outputs", pack_outputs([]), pack_stats(failing_engine.stats)])
    assert failing_engine.step_age_s < 7.5, "a step has ended since"
    failing_engine._popen.kill = lambda: pytest.fail("it does not leave by itself")
    failing_engine.close()
    assert failing_engine._popen.returncode == EXIT_ORPHANED


# ------------------------------------------------------------------------------------------------- building


def test_what_building_raises_is_raised_here():
    config = EngineConfig("/no/such/folder")
    with pytest.raises(ModelNotFound) as here:
        Engine(config)
    with pytest.raises(ModelNotFound) as there:
        EngineProcess(command(config, log_level="info", log_json=False), lambda: None)
    assert str(there.value) == str(here.value)


def test_a_process_that_dies_while_it_builds_says_so():
    with pytest.raises(EngineError, match="was killed by SIGKILL while it built the engine"):
        engine_program.start("")


def test_a_device_that_is_not_there_is_a_wrong_setting(tiny_model):
    """`ingine worker` with an engine in another process ends as it does with one in its own."""
    program = [
        sys.executable,
        "-m",
        "ingine.cli.main",
        "worker",
        "--model",
        str(tiny_model),
        "--device",
        "cuda:99",
    ]
    done = subprocess.run(program, capture_output=True, text=True, timeout=HANGS_S)
    assert done.returncode == 2
    assert "ingine: device 'cuda:99' cannot be used" in done.stderr
    assert "Traceback" not in done.stderr


# ------------------------------------------------------------------------------------------------- messages


def through_the_pipe(packed):
    unpacker = make_unpacker()
    unpacker.feed(pack(packed))
    ((unpacked,),) = unpacker
    return unpacked


def test_a_request_comes_back_as_it_was():
    params = SamplingParams(
        n=2,
        seed=7,
        stop=("\n",),
        stop_token_ids=(3,),
        logit_bias={65: 100.0},
        structured_outputs={"json": {"type": "object"}},
    )
    request = EngineRequest(
        "a#1",
        [1, 2],
        params,
        priority=-1,
        output_token_ids=[3],
        arrival_time=1.5,
        bad_words_token_ids=[[5, 6], [7]],
        tenant="t",
        other_output_token_ids=([4, 5],),
        ended_choices=(1,),
    )
    assert unpack_request(through_the_pipe(pack_request(request))) == request


def test_outputs_come_back_as_they_were():
    logprobs = [{"token_id": 5, "logprob": -0.5, "top": [[5, -0.5]]}]
    outputs = [
        SeqOutput("a#1", 7, [5], "é", 3, 0, logprobs=logprobs),
        SeqOutput("c#1", 0, [], "", 3, 0, error_code=ErrorCode.NO_ALLOWED_TOKEN),
        SeqOutput("b#2", 9, [], "", 3, 2, finish_reason=FinishReason.STOP, stop_reason="\n", final_text="�"),
        SeqOutput("b#2", 9, [5], "", 3, 2, None, FinishReason.LENGTH, None, "", index=3, others_run=True),
    ]
    back = unpack_outputs(through_the_pipe(pack_outputs(outputs)))
    assert back == outputs
    assert back[2].finish_reason is FinishReason.STOP


def test_messages_come_back_as_they_were():
    calls = [ToolCallDelta(1, arguments="}"), ToolCallDelta(2, "call_2", "f", '{"a": "é')]
    whole = Message("x\0", "hm", [ToolCall("call_1", "f", "{}"), ToolCall("call_2", "f", "")])
    outputs = [
        SeqOutput("a#1", 9, [1], "h", 3, 0),
        SeqOutput("a#1", 9, [1], "h", 3, 0, delta=MessageDelta("h")),
        SeqOutput(
            "b#1", 9, [1], "", 3, 0, delta=MessageDelta("", "hm", calls), final_delta=MessageDelta("x")
        ),
        SeqOutput(
            "c#1", 9, [], "", 3, 0, finish_reason=FinishReason.TOOL_CALLS, message=whole, others_run=True
        ),
        SeqOutput("d#1", 9, [], "", 3, 0, finish_reason=FinishReason.LENGTH, message=Message()),
    ]
    back = unpack_outputs(through_the_pipe(pack_outputs(outputs)))
    assert back == outputs
    assert back[3].finish_reason is FinishReason.TOOL_CALLS


@pytest.mark.parametrize(
    "error",
    [
        InvalidRequest(ErrorCode.DUPLICATE_ID, "twice"),
        ModelNotFound("nowhere"),
        ModuleNotFoundError("no torch", name="torch"),
    ],
)
def test_an_error_that_is_acted_upon_comes_back_as_it_was(error):
    back = unpack_error(through_the_pipe(pack_error(error)))
    assert (type(back), str(back), vars(back)) == (type(error), str(error), vars(error))


def test_any_other_error_comes_back_as_its_name_and_text():
    class NotPicklable(Exception):
        def __init__(self, one, two):
            super().__init__(f"{one} and {two}")

    back = unpack_error(through_the_pipe(pack_error(NotPicklable(1, 2))))
    assert (type(back), str(back)) == (EngineError, "NotPicklable: 1 and 2")
