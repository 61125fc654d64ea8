"""The message of an output has its special tokens where they came, whatever holds the text back."""

import pytest

from ingine.engine.parsers.message_parser import MessageParser
from ingine.engine.text.detokenizer import Detokenizer
from ingine.engine.text.message_text import MessageText
from ingine.engine.text.stop import StopStrings
from ingine.engine.text.tokenizer import Tokenizer
from ingine.message import Message, MessageAssembly, MessageDelta, ToolCall, ToolCallDelta
from tests.engine.chat_families import byte_level

TOKENIZER = Tokenizer.from_transformers(byte_level("x"))
FUNCTIONS = {"f": {}}


def deltas_of(text: str, stop: tuple[str, ...] = ()) -> tuple[list[MessageDelta], MessageText]:
    """As the engine makes them, token by token."""
    parser = MessageParser(tool_format="mistral", functions=FUNCTIONS)
    message, detokenizer, stops = MessageText(parser), Detokenizer(TOKENIZER), StopStrings(stop)
    deltas = []
    for token_id in TOKENIZER.encode(text):
        if TOKENIZER.token_bytes(token_id, first=False) is None:
            message.special(TOKENIZER.special_token(token_id))
        decoded = detokenizer.append(token_id)
        message.decoded(decoded)
        certain, stopped = stops.append(decoded)
        deltas.append(message.append(certain))
        if stopped is not None:
            return [*deltas, message.flush("")], message
    return [*deltas, message.flush(stops.flush() + detokenizer.flush())], message


def put_together(deltas: list[MessageDelta]) -> Message:
    assembly = MessageAssembly()
    for delta in deltas:
        assembly.add(delta)
    return assembly.message()


CALLS = "Sé 😀.[TOOL_CALLS]f[ARGS]{}[TOOL_CALLS]f{}"


@pytest.mark.parametrize("stop", [(), ("}!",), ("{}[TOOL", "é 😀.[")])
def test_special_tokens_are_where_they_were(stop):
    """Stop strings hold text back, and look at the text without special tokens."""
    deltas, message = deltas_of(CALLS, stop)
    whole = put_together(deltas)
    assert whole == message.message()
    assert whole.content == "Sé 😀."
    assert [(call.name, call.arguments) for call in whole.tool_calls] == [("f", "{}"), ("f", "{}")]
    assert message.finish_reason("stop") == "tool_calls"


def test_what_a_stop_string_cuts_off_is_in_no_message():
    _, message = deltas_of("Say END<s>[TOOL_CALLS]f{}", ("END",))
    assert message.message() == Message("Say ")
    _, message = deltas_of("Say [INST]E[TOOL_CALLS]ND", ("END",))
    assert message.message() == Message("Say [INST]")


def test_deltas_can_be_merged():
    deltas, message = deltas_of(CALLS)
    merged = MessageDelta()
    for delta in deltas:
        merged = merged.followed_by(delta)
    ids = [call.id for call in message.message().tool_calls]
    assert merged == MessageDelta(
        "Sé 😀.", "", [ToolCallDelta(0, ids[0], "f", "{}"), ToolCallDelta(1, ids[1], "f", "{}")]
    )
    assert put_together([merged]) == message.message()
    assert message.message().tool_calls == [ToolCall(ids[0], "f", "{}"), ToolCall(ids[1], "f", "{}")]
