"""Assistant messages on the wire: the fields of events, and the shapes that a reader accepts."""

import msgpack
import pytest

from ingine.contract.events import UNREADABLE, TerminalEvent, TokensEvent, decode_event, encode_event
from ingine.message import Message, MessageDelta, ToolCall, ToolCallDelta

FIRST = ToolCallDelta(0, "call_1", "weather", '{"city"')
MORE = ToolCallDelta(0, arguments=': "Oslo"}')
SECOND = ToolCallDelta(1, "call_2", "clock", "{}")
CALLED = Message(
    "", "hm", [ToolCall("call_1", "weather", '{"city": "Oslo"}'), ToolCall("call_2", "clock", "{}")]
)

DELTAS = [
    MessageDelta("hello"),
    MessageDelta(reasoning="hm"),
    MessageDelta("a", "b"),
    MessageDelta(tool_calls=[FIRST]),
    MessageDelta(tool_calls=[MORE]),
    MessageDelta("x", tool_calls=[MORE, SECOND]),
]
MESSAGES = [
    Message(),
    Message("hello"),
    Message("a", "b"),
    CALLED,
    Message("a", tool_calls=CALLED.tool_calls),
]


@pytest.mark.parametrize("delta", DELTAS, ids=repr)
def test_a_delta_comes_back_as_it_went(delta):
    for event in (
        TokensEvent(1, [5], "x", delta=delta.to_openai()),
        TokensEvent(1, [5], "x", None, 2, 1, delta=delta.to_openai()),
        TerminalEvent(1, "finished", "a", "x", delta=delta.to_openai()),
        TerminalEvent(1, "cancelled", "a", choices=[_end(delta=delta.to_openai())]),
    ):
        assert decode_event(encode_event(event)) == event
    assert MessageDelta.from_openai(event.choices[0]["delta"]) == delta


@pytest.mark.parametrize("message", MESSAGES, ids=repr)
def test_a_message_comes_back_as_it_went(message):
    for event in (
        TokensEvent(1, [5], "x", None, 2, 1, "tool_calls", message=message.to_openai()),
        TerminalEvent(1, "finished", "a", finish_reason="tool_calls", message=message.to_openai()),
        TerminalEvent(1, "finished", "a", choices=[_end(message=message.to_openai())]),
    ):
        assert decode_event(encode_event(event)) == event


def test_events_without_a_message_have_no_new_fields():
    for event in (TokensEvent(1, [5], "x"), TerminalEvent(1, "finished", "a")):
        assert {"delta", "message"}.isdisjoint(msgpack.unpackb(encode_event(event)))
        decoded = decode_event(encode_event(event))
        assert decoded.delta is None and decoded.message is None


def test_an_empty_delta_is_not_a_missing_one():
    for event in (TokensEvent(1, [5], "x", delta={}), TerminalEvent(1, "expired", "a", "x", delta={})):
        assert decode_event(encode_event(event)).delta == {}


def test_an_event_that_adds_nothing_shows_that_the_message_is_parsed():
    assert decode_event(encode_event(TokensEvent(1, [5], "<think>", delta={}))).delta == {}


def _end(**more) -> dict:
    return {"index": 0, "finish_reason": "stop", "num_output_tokens": 1} | more


def _call(**function) -> dict:
    return {"index": 0, "function": function}


WHOLE_CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
WRONG_DELTAS = [
    *(1, "x", [], b"x"),
    {"content": None},
    {"reasoning": 1},
    {"tool_calls": None},
    {"tool_calls": {}},
    {"tool_calls": [1]},
    {"tool_calls": [{}]},
    {"tool_calls": [{"index": 0}]},
    {"tool_calls": [{"index": 0, "function": []}]},
    {"tool_calls": [_call()]},
    {"tool_calls": [_call(arguments={})]},
    {"tool_calls": [_call(arguments="", name="f")]},
    {"tool_calls": [_call(arguments="") | {"index": True}]},
    {"tool_calls": [_call(arguments="") | {"index": -1}]},
    {"tool_calls": [_call(arguments="")] * 2},
    {"tool_calls": [_call(arguments="") | {"type": "function"}]},
    {"tool_calls": [_call(arguments="") | {"id": "c"}]},
    {"tool_calls": [WHOLE_CALL]},
    {"tool_calls": [WHOLE_CALL | {"index": 0, "id": None}]},
    {"tool_calls": [WHOLE_CALL | {"index": 0, "type": "other"}]},
]
WRONG_MESSAGES = [
    *(1, "x", [], {}),
    {"role": "user", "content": "x"},
    {"role": "assistant"},
    {"role": "assistant", "content": None},
    {"role": "assistant", "content": None, "tool_calls": []},
    {"role": "assistant", "content": [], "tool_calls": [WHOLE_CALL]},
    {"role": "assistant", "tool_calls": [WHOLE_CALL]},
    {"role": "assistant", "content": "x", "reasoning": None},
    {"role": "assistant", "content": "x", "tool_calls": {}},
    {"role": "assistant", "content": "x", "tool_calls": ["x"]},
    {"role": "assistant", "content": "x", "tool_calls": [WHOLE_CALL | {"function": {"name": "f"}}]},
    {"role": "assistant", "content": "x", "tool_calls": [WHOLE_CALL | {"function": {"arguments": ""}}]},
    {"role": "assistant", "content": "x", "tool_calls": [WHOLE_CALL | {"id": 1}]},
    {"role": "assistant", "content": "x", "tool_calls": [WHOLE_CALL | {"type": None}]},
]
TOKENS = {"type": "tokens", "position": 1, "token_ids": [5], "text": "x"}
CHOICE = TOKENS | {"index": 0, "choice_position": 1}
END = {"type": "finished", "position": 1, "job_id": "a"}


@pytest.mark.parametrize("delta", WRONG_DELTAS, ids=repr)
def test_a_delta_of_another_shape_is_no_event(delta):
    for fields in (TOKENS, CHOICE, END):
        _refused(fields | {"delta": delta})
    _refused(END | {"choices": [_end(delta=delta)]})


@pytest.mark.parametrize("message", WRONG_MESSAGES, ids=repr)
def test_a_message_of_another_shape_is_no_event(message):
    _refused(CHOICE | {"finish_reason": "stop", "message": message})
    _refused(END | {"message": message})
    _refused(END | {"choices": [_end(message=message)]})


def test_a_message_before_the_end_of_its_choice_is_no_event():
    message = Message("x").to_openai()
    _refused(TOKENS | {"message": message})
    _refused(CHOICE | {"message": message})
    assert (
        decode_event(msgpack.packb(CHOICE | {"finish_reason": "stop", "message": message})).message == message
    )


def _refused(fields: dict) -> None:
    with pytest.raises(UNREADABLE) as refused:
        decode_event(msgpack.packb(fields))
    assert len(repr(refused.value)) < 200


def test_fields_of_a_newer_worker_are_ignored():
    for delta in (
        {"audio": 1},
        {"content": "x", "later": []},
        {"tool_calls": [_call(arguments="", later=1)]},
    ):
        assert decode_event(msgpack.packb(TOKENS | {"delta": delta})).delta == delta
    message = {"role": "assistant", "content": "x", "annotations": []}
    assert decode_event(msgpack.packb(END | {"message": message})).message == message
