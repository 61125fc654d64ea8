"""What models write becomes the same message for every way in which it comes."""

import json
import random
import sys
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingine.engine.message_format import NamedFunction
from ingine.engine.parsers.message_parser import MessageParser
from ingine.engine.parsers.reader import Reader
from ingine.engine.parsers.tool_formats import TOOL_FORMATS
from ingine.message import Message, MessageAssembly, MessageDelta, ToolCallDelta
from tests.engine.model_outputs import FUNCTIONS, NOW, OUTPUTS, WEATHER, Output, tagged


def deltas_of(parser: MessageParser, pieces: list[str]) -> list[MessageDelta]:
    return [*(parser.feed(piece) for piece in pieces), parser.flush()]


def put_together(deltas: list[MessageDelta]) -> Message:
    assembly = MessageAssembly()
    for delta in deltas:
        assembly.add(delta)
    return assembly.message()


def parsed(output: Output, pieces: list[str]) -> Message:
    """The message, which all deltas put together are."""
    parser = output.parser()
    whole = put_together(deltas_of(parser, pieces))
    assert whole == parser.message()
    return whole


def cut(text: str, *at: int) -> list[str]:
    places = [0, *sorted(at), len(text)]
    return [text[start:end] for start, end in pairwise(places)]


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_text_is_this_message(name):
    output = OUTPUTS[name]
    message = parsed(output, [output.text])
    assert message.content == output.content
    assert message.reasoning == output.reasoning
    assert tuple((call.name, call.arguments) for call in message.tool_calls) == output.calls


@pytest.mark.parametrize("name", OUTPUTS)
def test_every_split_gives_the_same_message(name):
    output = OUTPUTS[name]
    whole = parsed(output, [output.text])
    assert parsed(output, list(output.text)) == whole
    for at in range(len(output.text) + 1):
        assert parsed(output, cut(output.text, at)) == whole


PARTS = [
    *(f"<tool_call>\n{NOW}", "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "now", "get_weather"),
    *("<|python_tag|>", "<function=now>", "</function>", "<parameter=city>", "</parameter>", "<think>"),
    *(
        "</think>",
        '{"name": "now"',
        ', "arguments": ',
        "{}",
        "{",
        "}",
        "[",
        "]",
        ",",
        ";",
        '"',
        "\\",
        "\\u00",
    ),
    *(r"\ud83d", r"\ude00", "\n", " ", "x", "é😀", "<", "\\n", "null", NOW, WEATHER),
]


@given(
    text=st.lists(st.sampled_from(PARTS), max_size=20).map("".join),
    format=st.sampled_from(sorted(TOOL_FORMATS)),
    choice=st.sampled_from(["auto", "required", "none", NamedFunction("now")]),
    tags=st.sampled_from([None, "think"]),
    starts_in_reasoning=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_any_text_gives_the_same_message_for_every_split(
    text, format, choice, tags, starts_in_reasoning, seed
):
    output = Output(format, text, choice=choice, tags=tags, starts_in_reasoning=starts_in_reasoning)
    rng = random.Random(seed)
    whole = parsed(output, [text])
    places = [rng.randint(0, len(text)) for _ in range(rng.randint(0, len(text)))]
    assert parsed(output, cut(text, *places)) == whole
    assert parsed(output, list(text)) == whole


@given(
    text=st.lists(st.sampled_from(PARTS), max_size=20).map("".join),
    format=st.sampled_from(sorted(TOOL_FORMATS)),
)
def test_a_text_without_calls_stays_as_it_is(text, format):
    message = parsed(Output(format, text), [text])
    if not message.tool_calls:
        assert message.content == text


@given(
    text=st.lists(st.sampled_from(PARTS), max_size=20).map("".join),
    format=st.sampled_from(sorted(TOOL_FORMATS)),
    at=st.integers(0, 200),
)
def test_what_is_out_stays_out(text, format, at):
    """A longer text has what a shorter one streamed, whatever follows: nothing is completed or taken back."""
    parser = Output(format, text).parser()
    shown = put_together([parser.feed(text[:at])])
    whole = parsed(Output(format, text), [text])
    assert whole.content.startswith(shown.content)
    assert len(shown.tool_calls) <= len(whole.tool_calls)
    for early, late in zip(shown.tool_calls, whole.tool_calls, strict=False):
        assert (early.id, early.name) == (late.id, late.name)
        assert late.arguments.startswith(early.arguments)


@pytest.mark.parametrize("name", OUTPUTS)
def test_id_and_name_come_once_and_indices_count_up(name):
    output = OUTPUTS[name]
    calls = [call for delta in deltas_of(output.parser(), list(output.text)) for call in delta.tool_calls]
    begun = [call for call in calls if call.id is not None]
    assert [call.index for call in begun] == list(range(len(output.calls)))
    assert [call.name for call in begun] == [name for name, _ in output.calls]
    assert [call.index for call in calls] == sorted(call.index for call in calls)
    assert all(call.name is None and call.arguments for call in calls if call.id is None)


def test_arguments_are_streamed_as_they_come():
    parser = OUTPUTS["one call"].parser()
    parser.feed('<tool_call>{"name": "get_weather", ')
    assert parser.feed('"arguments": {"city": "Pa').tool_calls == [
        ToolCallDelta(0, parser.message().tool_calls[0].id, "get_weather", '{"city": "Pa')
    ]
    assert parser.feed("r").tool_calls == [ToolCallDelta(0, arguments="r")]


def test_a_schema_is_read_once_however_often_a_parameter_comes():
    class Values(list):
        num_reads = 0

        def __iter__(self):
            self.num_reads += 1
            return super().__iter__()

    values = Values([1, 2])
    functions = {"f": {"properties": {"a": {"enum": values}}}}
    parser = MessageParser(tool_format="qwen3_coder", functions=functions)
    call = "<function=f><parameter=a>1</parameter><parameter=a>2</parameter></function>"
    parser.feed(call * 3)
    assert [call.arguments for call in parser.message().tool_calls] == ['{"a": 1, "a": 2}'] * 3
    assert values.num_reads == 1


def test_values_of_qwen3_coder_that_are_strings_are_streamed():
    parser = Output("qwen3_coder", "").parser()
    parser.feed("<function=get_weather>\n<parameter=city>\nPa")
    assert parser.feed('r"').tool_calls == [ToolCallDelta(0, arguments='r\\"')]


def test_other_json_is_not_held_back():
    parser = Output("llama3_json", "").parser()
    assert parser.feed('{"answer": 1').content == '{"answer": 1'


def test_ids_are_a_function_of_key_and_index():
    texts = [NOW, WEATHER]
    ids = [call.id for call in parsed(Output("hermes", ""), [tagged(*texts)]).tool_calls]
    assert ids == [call.id for call in parsed(Output("hermes", ""), [tagged(*texts)]).tool_calls]
    assert len(set(ids)) == 2
    other = MessageParser(tool_format="hermes", functions=FUNCTIONS, key="another job")
    other.feed(tagged(NOW))
    assert other.message().tool_calls[0].id not in ids


def test_mistral_has_ids_that_its_template_takes():
    (call,) = parsed(Output("mistral", ""), ["[TOOL_CALLS]now[ARGS]{}"]).tool_calls
    assert len(call.id) == 9
    assert call.id.isalnum()


@pytest.mark.parametrize(
    ("output", "reason", "expected"),
    [
        ("one call", "stop", "tool_calls"),
        ("cut in arguments", "length", "length"),
        ("plain text", "stop", "stop"),
        ("required", "stop", "tool_calls"),
        ("named", "stop", "stop"),
    ],
)
def test_finish_reason(output, reason, expected):
    parser = OUTPUTS[output].parser()
    deltas_of(parser, [OUTPUTS[output].text])
    assert parser.finish_reason(reason) == expected


def test_a_message_as_openai_has_it():
    message = parsed(OUTPUTS["reasoning"], [OUTPUTS["reasoning"].text])
    assert message.to_openai() == {
        "role": "assistant",
        "content": "So:",
        "reasoning": "Hm,\n\nwell.",
        "tool_calls": [
            {
                "id": message.tool_calls[0].id,
                "type": "function",
                "function": {"name": "now", "arguments": "{}"},
            }
        ],
    }
    assert parsed(OUTPUTS["one call"], [OUTPUTS["one call"].text]).to_openai()["content"] is None
    assert parsed(OUTPUTS["named, nothing"], []).to_openai() == {"role": "assistant", "content": ""}


@pytest.mark.parametrize("call", [ToolCallDelta(1, "a", "f"), ToolCallDelta(0), ToolCallDelta(0, "a")])
def test_deltas_out_of_turn_do_not_add_up(call):
    with pytest.raises(ValueError, match="out of turn"):
        put_together([MessageDelta(tool_calls=[call])])


# ----------------------------------------------------------------------------------------- work

LONG = {
    "hermes": ('<tool_call>{"name": "now", "arguments": {"a": "', 'x{"\\"y', '"}}</tool_call>'),
    "hermes, held": ('<tool_call>{"arguments": {"a": "', 'x{\\"y', '"}, "name": "now"}</tool_call>'),
    "hermes, in a string": ('<tool_call>{"name": "now", "arguments": "', r"\ud83d\ude00a", '"}'),
    "hermes, brackets": ('<tool_call>{"name": "now", "arguments": {"a": ', "[{", ""),
    "hermes, half tags": ("", "<tool_cal<", ""),
    "hermes, tags": ("", "<tool_call>", ""),
    "hermes, no name": ("<tool_call>{", '"id": 1,', ""),
    "hermes, space": ("", "\n ", ""),
    "llama3_json": ('{"name": "now", "arguments": {"a": "', "x;", '"}}'),
    "llama3_json, lines": ("", '\n{"name": "no', ""),
    "mistral": ('[TOOL_CALLS]now[ARGS]{"a": [', "[TOOL_CALL", "]}"),
    "qwen3_coder": ("<function=write_file><parameter=text>", '\n</parameter\n"', "</parameter></function>"),
    "qwen3_coder, value": ("<function=write_file><parameter=options>", '["', "</parameter></function>"),
    "generic": ("", "<tool_call>[TOOL_CALLS]<function=", ""),
}


def work_of(name: str, length: int, size: int) -> int:
    """Calls of Python functions, and characters in the reader's buffer at each push."""
    before, middle, behind = LONG[name]
    text = before + middle * (length // len(middle)) + behind
    parser = Output(name.partition(",")[0], "").parser()
    num_calls = num_chars = 0

    def count(frame, event, argument):
        nonlocal num_calls, num_chars
        num_calls += event in ("call", "c_call")
        if event == "return" and frame.f_code is Reader.push.__code__:
            num_chars += len(frame.f_locals["self"]._text)

    sys.setprofile(count)
    try:
        for at in range(0, len(text), size):
            parser.feed(text[at : at + size])
        parser.flush()
    finally:
        sys.setprofile(None)
    return num_calls + num_chars


@pytest.mark.parametrize("size", [1, 64])
@pytest.mark.parametrize("name", LONG)
def test_work_is_in_proportion_to_the_text(name, size):
    assert work_of(name, 16_000, size) < 4.5 * work_of(name, 4_000, size)


def test_a_megabyte_of_arguments():
    arguments = json.dumps({"text": 'a "quoted" {word} \\ é😀\n' * 40_000}, ensure_ascii=False)
    assert len(arguments) > 1_000_000
    text = tagged(f'{{"name": "write_file", "arguments": {arguments}}}')
    output = Output("hermes", text)
    for pieces in ([text], [text[at : at + 5] for at in range(0, len(text), 5)]):
        assert parsed(output, pieces).tool_calls[0].arguments == arguments
