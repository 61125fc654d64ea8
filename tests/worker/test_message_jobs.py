"""Chat jobs whose output is an assistant message: from a bare XADD to the terminal event, and after crashes.

A grammar forces what the model writes.
"""

from copy import deepcopy

import pytest

from ingine.contract.events import TerminalEvent, TokensEvent, decode_event
from ingine.contract.jobs import Job
from ingine.contract.record import JobStatus
from ingine.engine.engine import Engine
from ingine.engine.message_format import MessageFormat
from ingine.engine.parsers.message_parser import parser_of
from ingine.engine.parsers.reasoning import REASONING_TAGS
from ingine.message import MessageAssembly, MessageDelta
from ingine.sampling_params import SamplingParams
from tests.waiting import wait_until_async
from tests.worker.test_publisher import LOSE_TAIL
from tests.worker.test_worker import alone, ask_to_cancel, leave_behind

USER = {"role": "user", "content": "Hi"}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in ("f", "g")
]
PARSERS = {"tool_parser": "hermes", "reasoning_parser": "think"}
CALL_F = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
WHOLE = f"<think>hm</think>So{CALL_F}"
CALLS = r'(<tool_call>\{"name": "[fg]", "arguments": \{"a": [0-9]{1,3}\}\}</tool_call>){1,2}'
MANY = f"(<think>[a-c ]{{0,4}}</think>)?[a-e]{{0,3}}{CALLS}"
ENDLESS_REASONING = "<think>[a-z]{440}"
N = 3


def chat(job_id: str = "a", *, tools=TOOLS, regex: str | None = None, **options) -> Job:
    sampling = {"temperature": 1.5, "seed": 3, "max_tokens": 400} | options.pop("sampling", {})
    if regex is not None:
        sampling["structured_outputs"] = {"regex": regex}
    return Job(id=job_id, messages=[USER], tools=tools, sampling=SamplingParams(**sampling), **options)


def said(text: str, **options) -> Job:
    """A job that can only output `text`."""
    job = chat(**options)
    asked = {"structured_outputs": {"choice": [text]}}
    return job.model_copy(update={"sampling": SamplingParams(**job.sampling.given() | asked)})


def parsed(job: Job, text: str, index: int = 0, *, has_ended: bool = True) -> tuple[dict, str]:
    """The message that a text is, and the finish reason of a model that stops behind it. has_ended: nothing
    is held back.
    """
    functions = {"f": {"type": "object"}, "g": {"type": "object"}}
    parser = parser_of(
        MessageFormat("hermes", functions, reasoning=REASONING_TAGS["think"], key=job.id), index
    )
    parser.feed(text)
    if has_ended:
        parser.flush()
    return parser.message().to_openai(), parser.finish_reason("stop")


def put_together(deltas) -> dict:
    assembly = MessageAssembly()
    for delta in deltas:
        if delta is not None:
            assembly.add(MessageDelta.from_openai(delta))
    return assembly.message().to_openai()


def by_position(events: list[TokensEvent]) -> dict[int, dict]:
    """The message as it is after each event. Ids of calls are left out: they depend on the job's."""
    found = {}
    for number, event in enumerate(events, 1):
        found[event.position] = message = put_together(each.delta for each in events[:number])
        for call in message.get("tool_calls", []):
            del call["id"]
    return found


def of_job(job: Job, events: list[TokensEvent]) -> list[TokensEvent]:
    """The same events as a worker writes them for a job of another id: that of a call follows from it."""
    events = deepcopy(events)
    for event in events:
        called = parsed(job, CALL_F * 2, event.index)[0]["tool_calls"]
        for call in (event.delta or {}).get("tool_calls", []):
            if "id" in call:
                call["id"] = called[call["index"]]["id"]
        for call, same in zip((event.message or {}).get("tool_calls", []), called, strict=False):
            call["id"] = same["id"]
    return events


def without_ids(messages: list[dict]) -> list[dict]:
    """The messages with only the functions of their calls."""
    return [
        message | {"tool_calls": [call["function"] for call in message.get("tool_calls", [])]}
        for message in messages
    ]


def check_one(job: Job, events: list[TokensEvent | TerminalEvent], text: str) -> None:
    """Check a finished job of one choice, whose output is `text`."""
    *tokens, end = events
    message, reason = parsed(job, text)
    assert "".join(event.text for event in events) == text
    assert (end.status, end.finish_reason) == (JobStatus.FINISHED, reason)
    assert end.message == message == put_together(event.delta for event in events)
    assert all(event.message is None for event in tokens)


def check_choices(job: Job, events: list[TokensEvent | TerminalEvent]) -> list[dict]:
    """Check a finished job of several choices. Returns their messages."""
    *tokens, end = events
    found = []
    for index, ending in enumerate(end.choices):
        of = [event for event in tokens if event.index == index]
        text = "".join(event.text for event in of) + ending.get("text", "")
        message, reason = parsed(job, text, index)
        assert message == put_together([*(event.delta for event in of), ending.get("delta")])
        assert message == (of[-1].message if of and of[-1].finish_reason else ending["message"])
        assert ending["finish_reason"] == reason
        assert all(event.message is None for event in of[:-1])
        found.append(message)
    assert end.delta is None and end.message is None
    return found


@pytest.mark.parametrize(
    ("text", "tools", "expected"),
    [
        (WHOLE, TOOLS, {"content": "So", "reasoning": "hm", "num_calls": 1}),
        (CALL_F * 2, TOOLS, {"content": None, "num_calls": 2}),
        ("<think>hm</think>So", None, {"content": "So", "reasoning": "hm", "num_calls": 0}),
        ("So<tool_call", TOOLS, {"content": "So<tool_call", "num_calls": 0}),
        ("So", TOOLS, {"content": "So", "num_calls": 0}),
    ],
)
async def test_the_events_of_a_job_have_its_message(harness, text, tools, expected):
    worker, job = await harness(**PARSERS), said(text, tools=tools, reply_to="me")
    await worker.push(job)
    events = await worker.events("a")
    check_one(job, events, text)
    message = events[-1].message
    assert message["content"] == expected["content"]
    assert message.get("reasoning") == expected.get("reasoning")
    assert len(message.get("tool_calls", [])) == expected["num_calls"]
    ((_, fields),) = await worker.redis.xrange(worker.keys.replies("me"))
    assert decode_event(fields[b"event"]) == events[-1]


@pytest.fixture
def one_by_one(tiny_engine, step_by_step) -> Engine:
    """An engine that computes one token in a step, also where the grammar leaves no other. Each step has
    events of its own."""
    engine = tiny_engine()
    engine._scheduler.max_forced_draft = 0
    return engine


async def test_the_arguments_of_a_call_are_streamed(harness, one_by_one):
    worker = await harness(one_by_one, **PARSERS)
    await worker.push(said(CALL_F))
    *tokens, _ = await worker.events("a")
    [first, *more] = [event.delta["tool_calls"] for event in tokens if event.delta]
    assert first == [
        {"index": 0, "id": first[0]["id"], "type": "function", "function": {"name": "f", "arguments": "{"}}
    ]
    assert [calls[0]["function"] for calls in more] == [{"arguments": char} for char in '"a": 1}']


async def test_each_choice_has_its_message(harness):
    worker, job = await harness(**PARSERS), chat(regex=MANY, sampling={"n": N})
    await worker.push(job)
    messages = check_choices(job, await worker.events("a"))
    ids = [call["id"] for message in messages for call in message.get("tool_calls", [])]
    assert ids and len(set(ids)) == len(ids), "no two calls of a job have the same id"


async def test_a_message_that_max_tokens_cuts_off_is_cut_off(harness):
    worker, job = await harness(**PARSERS), said(WHOLE, sampling={"max_tokens": len(WHOLE) - 20})
    await worker.push(job)
    events = await worker.events("a")
    end = events[-1]
    assert end.finish_reason == "length"
    assert end.message == put_together(event.delta for event in events)
    assert end.message == parsed(job, WHOLE[:-20])[0]
    assert not end.message["tool_calls"][0]["function"]["arguments"].endswith("}")


@pytest.mark.parametrize("drafts", [False, True])
async def test_a_job_goes_on_at_each_position_as_if_nothing_had_happened(
    harness, one_by_one, tiny_engine, drafts
):
    """The deltas up to a position are the same whichever attempt they come from. So a consumer that has read
    more than the log has kept goes on behind its own position.

    drafts: the second worker computes several tokens in a step where the grammar forces them.
    """
    worker, job = await harness(one_by_one, **PARSERS), said(WHOLE)
    await worker.push(job)
    *tokens, end = await worker.events("a")
    assert [event.position for event in tokens] == list(range(1, len(WHOLE) + 2))
    await worker.stop()
    heir = tiny_engine()
    if not drafts:
        heir._scheduler.max_forced_draft = 0
    whole, worker = by_position(tokens), await harness(heir, **PARSERS)
    for position in range(len(tokens) + 1):
        again = job.model_copy(update={"id": f"at-{position}"})
        await leave_behind(worker, again, of_job(again, tokens[:position]), number=position)
    for position in range(len(tokens) + 1):
        again = job.model_copy(update={"id": f"at-{position}"})
        *rest, resumed = events = await worker.events(again.id)
        check_one(again, events, WHOLE)
        assert rest[:position] == of_job(again, tokens[:position])
        found = by_position(rest)
        assert found.items() <= whole.items() if drafts else found == whole
        assert (resumed.text, resumed.delta, resumed.timings["attempts"]) == (end.text, end.delta, 2)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8, 1.0])
async def test_choices_go_on_from_a_log(harness, share):
    worker, job = await harness(**PARSERS), chat(regex=MANY, sampling={"n": N})
    await worker.push(job)
    *tokens, end = await worker.events("a")
    messages = check_choices(job, [*tokens, end])
    again = job.model_copy(update={"id": "b"})
    await leave_behind(worker, again, of_job(again, tokens[: int(share * len(tokens))]))
    resumed = await worker.events("b")
    assert resumed[-1].timings["attempts"] == 2
    assert without_ids(check_choices(again, resumed)) == without_ids(messages)


@pytest.mark.parametrize("n", [1, N])
async def test_a_second_worker_goes_on_after_a_hand_over(harness, n):
    first, text = await harness(**PARSERS), "<think>hm</think>" + "So" * 150 + CALL_F
    job = said(text, sampling={"n": n})
    await first.push(job)
    await wait_until_async(lambda: first.position("a"), what="tokens")
    await first.stop()
    second = await harness(**PARSERS)
    events = await second.events("a")
    assert events[-1].timings["attempts"] == 2
    if n == 1:
        check_one(job, events, text)
    else:
        assert [message["content"] for message in check_choices(job, events)] == ["So" * 150] * N


@pytest.mark.parametrize("n", [1, N])
async def test_events_that_the_server_lost_are_written_again_with_their_deltas(harness, monkeypatch, n):
    worker = await harness(**PARSERS)
    finish, kept = worker.queue.finish, []

    async def finish_after_a_loss(finishing):
        if not kept:
            names = worker.keys.job("a"), worker.keys.tokens("a")
            kept.append(await worker.redis.eval(LOSE_TAIL, 2, *names))
        return await finish(finishing)

    monkeypatch.setattr(worker.queue, "finish", finish_after_a_loss)
    job = said(WHOLE, sampling={"n": n})
    await worker.push(job)
    events = await worker.events("a")
    assert 0 < kept[0] < n * len(WHOLE)
    if n == 1:
        check_one(job, events, WHOLE)
    else:
        assert [message["content"] for message in check_choices(job, events)] == ["So"] * N


@pytest.mark.parametrize("n", [1, N])
@pytest.mark.parametrize("how", ["cancelled", "expired"])
async def test_a_job_that_ends_early_has_deltas_and_no_message(harness, how, n):
    worker = await harness(**PARSERS)
    deadline = {"deadline_ms": 400} if how == "expired" else {}
    job = chat(regex=ENDLESS_REASONING, sampling={"n": n, "max_tokens": 440}, **deadline)
    await worker.push(job)
    if how == "cancelled":
        await wait_until_async(lambda: worker.position("a"), what="tokens")
        await ask_to_cancel(worker, "a")
    *tokens, end = await worker.events("a")
    assert end.status == how and end.message is None
    ends = end.choices or [{"delta": end.delta, "text": end.text}]
    for index, ending in enumerate(ends if end.position else []):
        of = [event for event in tokens if event.index == index]
        text = "".join(event.text for event in of) + ending.get("text", "")
        assert "message" not in ending
        deltas = put_together([*(event.delta for event in of), ending.get("delta")])
        # The log of a cancelled job may lack the tokens to which what was held back belongs.
        assert deltas == parsed(job, text, index, has_ended=how == "expired")[0]


async def events_of(worker, job: Job) -> list[bytes]:
    """The bytes of the events with tokens."""
    await worker.push(job)
    await worker.end(job.id)
    entries = await worker.redis.xrange(worker.keys.tokens(job.id))
    return [fields[b"event"] for _, fields in entries[:-1]]


@pytest.mark.parametrize("options", [{"tools": None}, {"tools": TOOLS, "tool_choice": "none"}], ids=repr)
async def test_a_chat_without_tools_and_reasoning_has_the_bytes_of_any_other_job(
    harness, step_by_step, options, tiny_engine
):
    worker, job = await harness(), chat(sampling={"ignore_eos": True, "max_tokens": 24}, **options)
    prompt = tiny_engine().tokenizer.encode_chat([USER])
    as_ids = Job(id="b", prompt=tuple(prompt), sampling=job.sampling)
    assert await events_of(worker, job) == await events_of(worker, as_ids)
    end, other = await worker.end("a"), await worker.end("b")
    assert (end.text, end.finish_reason, end.delta, end.message) == (other.text, "length", None, None)
    assert "".join(event.text for event in await worker.events("a")) == alone(tiny_engine(), as_ids)[1]


async def test_a_job_without_text_has_no_message(harness):
    worker = await harness(**PARSERS)
    await worker.push(chat(sampling={"detokenize": False, "ignore_eos": True, "max_tokens": 8}))
    events = await worker.events("a")
    assert events[-1].status is JobStatus.FINISHED
    assert all((event.delta, event.message, event.text) == (None, None, "") for event in events)
