"""Lines with the same beginning are submitted near each other: none is lost, or overtaken without bound."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingine.producer import AsyncClient, batch_order
from ingine.producer.batch_order import group_by_prefix
from ingine.producer.openai.batch_format import Line, parse_line
from tests.producer.fake_worker import FakeWorker
from tests.producer.test_batch import Files, request, run, serving

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def parsed(number: int, url: str, **body) -> Line:
    raw = json.dumps({"custom_id": f"{number}", "url": url, "body": body}).encode()
    return parse_line(number, raw, model=None, known_ids=set())


def completion(number: int, prompt: object) -> Line:
    return parsed(number, COMPLETIONS, prompt=prompt)


def chat(number: int, *texts: str, **body) -> Line:
    return parsed(
        number, CHAT, messages=[{"role": "user", "content": text} for text in texts], max_tokens=1, **body
    )


def numbers(lines: list[Line]) -> list[int]:
    return [line.number for line in group_by_prefix(lines)]


def test_completions_that_begin_alike_follow_each_other():
    prompts = ["a 1", "b 1", "a 2", "b 2", [1, 2, 3], "a 3", [1, 2, 4]]
    order = numbers([completion(number, prompt) for number, prompt in enumerate(prompts)])
    assert [prompts[number] for number in order] == ["a 1", "a 2", "a 3", "b 1", "b 2", [1, 2, 3], [1, 2, 4]]


def test_chats_that_begin_alike_follow_each_other():
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    lines = [
        chat(0, "You are a cook.", "Eggs?"),
        chat(1, "You are a poet.", "Eggs?"),
        chat(2, "You are a cook.", "Eggs?", tools=tools),
        chat(3, "You are a cook.", "Flour?", temperature=0),
        chat(4, "You are a poet.", "Flour?"),
        chat(5, "You are a cook.", "Flour?", tools=tools),
    ]
    order = numbers(lines)
    assert sorted(order) == [*range(6)]
    assert sorted(order.index(number) // 2 for number in (2, 5)) in ([0, 0], [1, 1], [2, 2])
    assert abs(order.index(0) - order.index(3)) == abs(order.index(1) - order.index(4)) == 1


@given(st.lists(st.sampled_from(["a", "b", "c", "a long prompt", None]), max_size=60))
def test_no_line_is_lost_or_overtaken_by_more_than_its_window(prompts: list[str | None]):
    lines = [
        completion(number, prompt) if prompt else parsed(number, "/nowhere")
        for number, prompt in enumerate(prompts)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_order, "MAX_LINES", 8)
        order = numbers(lines)
    assert sorted(order) == [*range(len(lines))]
    valid = [number for number in order if prompts[number]]
    for place, number in enumerate(valid):
        assert sum(later > number for later in valid[:place]) < 8


def test_long_prompts_make_a_window_shorter(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(batch_order, "MAX_CHARACTERS", 1000)
    num_read = 0

    def lines():
        nonlocal num_read
        for number in range(100):
            num_read += 1
            yield completion(number, f"{number % 2}" * 400)

    first = next(group_by_prefix(lines()))
    assert first.number == 0
    assert num_read == 3


@pytest.mark.parametrize("ordered", [False, True])
async def test_a_batch_submits_them_so_unless_its_rows_are_ordered(
    client: AsyncClient, worker: FakeWorker, tmp_path, ordered: bool
):
    files = Files(tmp_path)
    files.write(*(request(n, prompt=f"{'ab'[n % 2]} {n:03}") for n in range(20)))
    async with serving(worker) as jobs:
        await run(client, files, window=1, ordered=ordered)
    prompts = [job.prompt for job in jobs]
    assert len(prompts) == 20
    assert (prompts == sorted(prompts)) is not ordered
    assert files.ids()[0] == [f"line-{n:03}" for n in range(20)]
