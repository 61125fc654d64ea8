"""The message of an output has its special tokens where they came, whatever holds the text back."""

import pytest

from ingine.engine.parsers.message_parser import MessageParser
from ingine.engine.text.message_text import MessageText
from ingine.engine.text.output_text import OutputText
from ingine.engine.text.tokenizer import Tokenizer
from ingine.message import Message, MessageAssembly, MessageDelta, ToolCall, ToolCallDelta
from ingine.sampling_params import SamplingParams
from tests.engine.chat_families import byte_level, legacy_sentencepiece

TOKENIZER = Tokenizer.from_transformers(byte_level("x"))
FUNCTIONS = {"f": {}}
END = TOKENIZER.encode("</s>")[0]


def deltas_of(
    text: str | list[int], stop: tuple[str, ...] = (), *, tokenizer: Tokenizer = TOKENIZER, **params
) -> tuple[list[MessageDelta], MessageText]:
    """As a sequence makes them, token by token."""
    parser = MessageParser(tool_format="mistral", functions=FUNCTIONS)
    params = SamplingParams(stop=stop, **params)
    message, deltas = MessageText(parser, tokenizer), []
    output = OutputText(
        params, max_tokens=1000, eos_token_ids={END}, tokenizer=tokenizer, message_text=message
    )
    for token_id in tokenizer.encode_word(text) if isinstance(text, str) else text:
        output.append(token_id)
        deltas.append(message.take_delta())
        if output.finish_reason is not None:
            break
    output.flush()
    return [delta for delta in [*deltas, message.take_delta()] if delta is not None], message


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


SHOWS = [
    {"skip_special_tokens": False},
    {"skip_special_tokens": False, "spaces_between_special_tokens": False},
    {"include_stop_str_in_output": True},
    {"skip_special_tokens": False, "include_stop_str_in_output": True},
]
TOKENIZERS = {
    "bytes": TOKENIZER,
    "sentencepiece": Tokenizer.from_transformers(legacy_sentencepiece("x")),
}


@pytest.mark.parametrize("shows", SHOWS, ids=str)
@pytest.mark.parametrize("stop", [(), ("}!",), ("{}", "f{}"), ("é 😀", "n'a")], ids=str)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_message_does_not_depend_on_what_the_text_shows(name, stop, shows):
    """Among the tokens are halves of characters, and special tokens within a character."""
    tokenizer = TOKENIZERS[name]
    half = tokenizer.encode_word("€")
    inst, call = (tokenizer.encode_word(text) for text in ("[INST]", CALLS + "</s>"))
    [end] = tokenizer.encode_word("</s>")[-1:]
    for tokens in (
        call,
        [*half[:-1], *inst, *inst, half[-1], *call],
        [*inst, *inst, *call[:-1], *half[:-1], end],
        call[:-3] + half[:-1],
    ):
        deltas, message = deltas_of(tokens, stop, tokenizer=tokenizer, stop_token_ids=(end,))
        shown_deltas, shown = deltas_of(tokens, stop, tokenizer=tokenizer, stop_token_ids=(end,), **shows)
        assert shown.message() == message.message() == put_together(deltas)
        if "skip_special_tokens" not in shows:
            assert shown_deltas == deltas
        assert put_together(shown_deltas) == shown.message()


def test_a_stop_string_in_a_special_token_that_is_shown_cuts_it_out_of_the_message():
    _, message = deltas_of("Say [TOOL_CALLS]f{}", ("CALLS",), skip_special_tokens=False)
    assert message.message() == Message("Say ")


def test_a_token_that_ends_the_output_is_in_no_message():
    for shows in SHOWS:
        [bang] = TOKENIZER.encode("!")
        _, message = deltas_of("Say!x", stop_token_ids=(bang,), **shows)
        assert message.message() == Message("Say")
        _, message = deltas_of("Say</s>x", **shows)
        assert message.message() == Message("Say")


@pytest.mark.parametrize("shows", [{}, *SHOWS], ids=str)
def test_a_special_token_ends_an_unfinished_character(shows):
    """What is behind it begins anew: in the text the halves of a character go together."""
    replaced = "\N{REPLACEMENT CHARACTER}"
    half, *rest = TOKENIZER.encode_word("é")
    marker, call = TOKENIZER.encode_word("[TOOL_CALLS]"), TOKENIZER.encode_word("f{}")
    deltas, message = deltas_of([half, *marker, *call], **shows)
    assert put_together(deltas) == message.message()
    assert message.message().content == replaced
    assert [(call.name, call.arguments) for call in message.message().tool_calls] == [("f", "{}")]
    _, message = deltas_of([half, *marker, *rest, *call], **shows)
    assert message.message() == Message(f"{replaced}[TOOL_CALLS]{replaced}f{{}}")
