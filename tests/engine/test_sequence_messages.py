"""A sequence's deltas put together are its message: in whatever steps its tokens come, and from wherever an
earlier attempt has left off."""

import random
from itertools import pairwise

import pytest

from ingine.engine.message_format import MessageFormat
from ingine.engine.outputs import FinishReason, SeqOutput
from ingine.engine.parsers.message_parser import parser_of
from ingine.engine.parsers.reasoning import REASONING_TAGS
from ingine.engine.request import EngineRequest
from ingine.engine.schedule.sequence import Sequence
from ingine.engine.text.tokenizer import Tokenizer
from ingine.message import Message, MessageAssembly
from ingine.sampling_params import SamplingParams
from tests.engine.chat_families import byte_level, legacy_sentencepiece, sentencepiece
from tests.engine.model_outputs import FUNCTIONS, OUTPUTS, Output

PROMPT = [1, 2, 3]
TOKENIZERS = {
    "byte level": Tokenizer.from_transformers(byte_level("x")),
    "sentencepiece": Tokenizer.from_transformers(sentencepiece("x")),
    "legacy sentencepiece": Tokenizer.from_transformers(legacy_sentencepiece("x")),
}
STOPS = ("}}}never", "</tool_call>\nnever", "Paris never")
"""They hold text back, and do not come."""
CALLS = OUTPUTS["mistral, newer"]


def format_of(output: Output) -> MessageFormat:
    return MessageFormat(
        tool_format=output.format,
        functions=FUNCTIONS,
        tool_choice=output.choice,
        reasoning=REASONING_TAGS[output.tags] if output.tags else None,
        starts_in_reasoning=output.starts_in_reasoning,
        key="job",
    )


def make(
    tokenizer: Tokenizer,
    output: Output,
    *,
    index: int = 0,
    so_far: list[int] | None = None,
    ended: tuple[int, ...] = (),
    max_num_tokens: int = 10_000,
    **params,
) -> Sequence:
    """A sequence of which `so_far` is committed."""
    committed = [so_far or []] * (index + 1)
    request = EngineRequest(
        "a",
        PROMPT,
        SamplingParams(**params),
        output_token_ids=committed[0],
        other_output_token_ids=committed[1:],
        ended_choices=ended,
        message=format_of(output),
    )
    return Sequence(
        request,
        seed=0,
        sort_key=(0, 0),
        max_num_tokens=max_num_tokens,
        eos_token_ids=frozenset({end_of(tokenizer)}),
        tokenizer=tokenizer,
        index=index,
    )


def end_of(tokenizer: Tokenizer) -> int:
    return tokenizer.encode_word("</s>")[-1]


def tokens_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return [*tokenizer.encode_word(text), end_of(tokenizer)]


def run(seq: Sequence, *steps: list[int]) -> list[SeqOutput]:
    """Append the tokens of steps as the engine does."""
    outputs = []
    for tokens in steps:
        text, taken = "", []
        for token_id in tokens:
            if seq.finish_reason is None:
                taken.append(token_id)
                text += seq.append(token_id)
        if taken:
            outputs.append(seq.output(taken, text))
    return outputs or [seq.output([])]  # it had ended before


def put_together(outputs: list[SeqOutput]) -> Message:
    assembly = MessageAssembly()
    for delta in (delta for output in outputs for delta in (output.delta, output.final_delta)):
        if delta is not None:
            assert delta, "an empty delta is None"
            assembly.add(delta)
    return assembly.message()


def read_at_once(tokenizer: Tokenizer, token_ids: list[int], output: Output, index: int = 0) -> Message:
    """The message of all tokens, which end without a stop string."""
    pieces, is_first = [], True
    for token_id in token_ids:
        token = tokenizer.token_bytes(token_id, first=is_first)
        is_first = is_first and token is None
        pieces.append(tokenizer.special_token(token_id).encode() if token is None else token)
    parser = parser_of(format_of(output), index)
    parser.feed(b"".join(pieces).decode(errors="replace"))
    parser.flush()
    return parser.message()


def each_alone(token_ids: list[int]) -> list[list[int]]:
    return [[token_id] for token_id in token_ids]


def in_pieces(token_ids: list[int], *at: int) -> list[list[int]]:
    return [token_ids[start:end] for start, end in pairwise([0, *sorted(at), len(token_ids)])]


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_sequence_has_the_message_of_its_text(name):
    output, tokenizer = OUTPUTS[name], TOKENIZERS["byte level"]
    outputs = run(make(tokenizer, output), *each_alone(tokens_of(tokenizer, output.text)))
    message, last = outputs[-1].message, outputs[-1]
    assert (message.content, message.reasoning) == (output.content, output.reasoning)
    assert tuple((call.name, call.arguments) for call in message.tool_calls) == output.calls
    calls_freely = bool(output.calls) and isinstance(output.choice, str)
    assert last.finish_reason is (FinishReason.TOOL_CALLS if calls_freely else FinishReason.STOP)
    assert all(output.message is output.final_delta is None for output in outputs[:-1])


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
@pytest.mark.parametrize("name", OUTPUTS)
def test_every_split_into_steps_gives_the_same_message(name, tokenizer):
    output, dice = OUTPUTS[name], random.Random(name)
    token_ids = tokens_of(tokenizer, output.text)
    expected = read_at_once(tokenizer, token_ids[:-1], output)
    places = range(0, len(token_ids), 1 if tokenizer is TOKENIZERS["byte level"] else 9)
    splits = [each_alone(token_ids), *(in_pieces(token_ids, at) for at in places)]
    splits += [in_pieces(token_ids, *dice.choices(range(len(token_ids)), k=7)) for _ in range(10)]
    for number, steps in enumerate(splits):
        outputs = run(make(tokenizer, output, stop=STOPS if number % 2 else ()), *steps)
        assert outputs[-1].message == put_together(outputs) == expected
        merged = outputs[0]
        for later in outputs[1:]:
            merged = merged.followed_by(later)
        assert put_together([merged]) == merged.message == expected


@pytest.mark.parametrize(
    ("tokenizer", "params"),
    [
        (TOKENIZERS["byte level"], {}),
        (TOKENIZERS["byte level"], {"max_tokens": 30}),
        (TOKENIZERS["legacy sentencepiece"], {"stop": STOPS}),
    ],
    ids=["to the end", "max_tokens", "text held back"],
)
@pytest.mark.parametrize("name", OUTPUTS)
def test_resumed_at_every_token_it_has_the_same_message(name, tokenizer, params):
    output = OUTPUTS[name]
    token_ids = tokens_of(tokenizer, output.text)
    whole = run(make(tokenizer, output, **params), *each_alone(token_ids))
    num_tokens = whole[-1].position
    for position in range(num_tokens + 1):
        so_far, rest = token_ids[:position], token_ids[position:]
        outputs = run(make(tokenizer, output, so_far=so_far, **params), *each_alone(rest))
        earlier = whole[:position]
        if position == num_tokens:  # what was held back was not committed
            earlier[-1].final_delta = None
            assert outputs[0].delta is None
        assert put_together(earlier + outputs) == outputs[-1].message == whole[-1].message
        assert outputs[-1].finish_reason is whole[-1].finish_reason


@pytest.mark.parametrize("stop", ["is", '{"city"', "</tool_call>", "get_", "😀"])
@pytest.mark.parametrize("name", ["three calls", "mistral, newer", "coder", "tricky arguments"])
def test_a_stop_string_cuts_the_message_as_it_cuts_the_text(name, stop):
    output, tokenizer = OUTPUTS[name], TOKENIZERS["byte level"]
    token_ids = tokens_of(tokenizer, output.text)
    text = tokenizer.decode(token_ids)
    outputs = run(make(tokenizer, output, stop=(stop,)), *each_alone(token_ids))
    if stop in text:
        kept = output.text[: output.text.index(stop)]
        assert outputs[-1].stop_reason == stop
        assert outputs[-1].message == read_at_once(tokenizer, tokenizer.encode_word(kept), output)
    assert put_together(outputs) == outputs[-1].message
    for size in range(2, 9):
        steps = in_pieces(token_ids, *range(size, len(token_ids), size))
        assert run(make(tokenizer, output, stop=(stop,)), *steps)[-1].message == outputs[-1].message


def test_a_call_that_is_cut_off_stays_as_it_is():
    tokenizer, output = TOKENIZERS["byte level"], OUTPUTS["one call"]
    before, _, _ = output.text.partition("ris")
    num_tokens = len(tokenizer.encode_word(before))
    for params, reason in (({"stop": ("ris",)}, "tool_calls"), ({"max_tokens": num_tokens}, "length")):
        last = run(make(tokenizer, output, **params), tokens_of(tokenizer, output.text))[-1]
        [call] = last.message.tool_calls
        assert (call.arguments, last.finish_reason) == ('{"city": "Pa', reason)


def test_each_choice_has_calls_of_its_own():
    tokenizer = TOKENIZERS["sentencepiece"]
    token_ids = tokens_of(tokenizer, CALLS.text)
    ids = set()
    for index in range(4):
        [last] = run(make(tokenizer, CALLS, index=index, n=4), token_ids)
        assert last.message == read_at_once(tokenizer, token_ids[:-1], CALLS, index)
        ids |= {call.id for call in last.message.tool_calls}
    assert len(ids) == 8


@pytest.mark.parametrize("num_tokens", [0, 1, 20, 40])
def test_a_choice_that_has_ended_has_its_message(num_tokens):
    """Here an earlier attempt has ended it, for a limit that this one does not have."""
    tokenizer = TOKENIZERS["byte level"]
    token_ids = tokens_of(tokenizer, CALLS.text)[:num_tokens]
    [last] = run(make(tokenizer, CALLS, index=1, n=2, so_far=token_ids, ended=(1,)))
    assert last.message == read_at_once(tokenizer, token_ids, CALLS, 1)
    assert (last.delta, last.finish_reason) == (None, FinishReason.LENGTH)
    cut = run(make(tokenizer, CALLS, index=1, n=2, max_tokens=max(num_tokens, 1)), token_ids)
    assert num_tokens == 0 or cut[-1].message == last.message


@pytest.mark.parametrize("reason", [FinishReason.ABORT, FinishReason.ERROR])
def test_an_output_that_is_broken_off_has_deltas_and_no_message(reason):
    tokenizer = TOKENIZERS["byte level"]
    token_ids = tokens_of(tokenizer, CALLS.text)
    for position in range(len(token_ids)):
        seq = make(tokenizer, CALLS, stop=STOPS)
        outputs = [] if position == 0 else run(seq, *each_alone(token_ids[:position]))
        seq.finish(reason)
        outputs.append(seq.output([]))
        assert (outputs[-1].message, outputs[-1].delta) == (None, None)
        assert put_together(outputs) == read_at_once(tokenizer, token_ids[:position], CALLS)


def test_half_a_character_comes_once_it_is_whole_or_at_the_end():
    tokenizer, output = TOKENIZERS["byte level"], OUTPUTS["no tools"]
    first, second = tokenizer.encode_word("é")
    outputs = run(make(tokenizer, output, max_tokens=3), [first], [second], [first])
    contents = [output.delta and output.delta.content for output in outputs]
    assert contents == [None, "é", None]
    assert outputs[-1].final_delta.content == "\N{REPLACEMENT CHARACTER}"
    assert outputs[-1].message.content == "é\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize(
    "params",
    [
        {"skip_special_tokens": False},
        {"skip_special_tokens": False, "spaces_between_special_tokens": False},
        {"include_stop_str_in_output": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
@pytest.mark.parametrize("stop", [(), ("}]", "now"), STOPS], ids=str)
def test_what_the_text_shows_changes_no_message(params, tokenizer, stop):
    for output in OUTPUTS.values():
        token_ids = tokens_of(tokenizer, output.text)
        [plain] = run(make(tokenizer, output, stop=stop), token_ids)
        outputs = run(make(tokenizer, output, stop=stop, **params), *each_alone(token_ids))
        assert put_together(outputs) == outputs[-1].message == plain.message


def test_without_a_format_or_text_there_is_no_message():
    tokenizer = TOKENIZERS["byte level"]
    token_ids = tokens_of(tokenizer, CALLS.text)
    request = EngineRequest("a", PROMPT, SamplingParams(max_tokens=len(token_ids)))
    plain = Sequence(request, seed=0, sort_key=(0, 0), max_num_tokens=1000, tokenizer=tokenizer)
    for seq, reason in ((plain, "length"), (make(tokenizer, CALLS, detokenize=False), "stop")):
        outputs = run(seq, *each_alone(token_ids))
        assert outputs[-1].finish_reason == reason
        for output in outputs:
            assert (output.delta, output.final_delta, output.message) == (None, None, None)


@pytest.mark.parametrize("num_more", [0, 3])
def test_an_engine_of_a_lower_limit_has_the_message_of_all_that_is_committed(num_more):
    """The text that was held back where its own limit lies has been committed since."""
    output, tokenizer = OUTPUTS["text around calls"], TOKENIZERS["byte level"]
    tokens = tokens_of(tokenizer, output.text)[:-1]
    stop = output.text[10:30] + "never"
    before = run(make(tokenizer, output, stop=(stop,)), *each_alone(tokens))
    at = next(position for position in range(len(tokens)) if not before[position].text) + num_more
    resumed = make(tokenizer, output, so_far=tokens, stop=(stop,), max_num_tokens=len(PROMPT) + at)
    [last] = run(resumed)
    assert (last.finish_reason, last.position) == (FinishReason.LENGTH, len(tokens))
    assert last.message == put_together([*before, last])
    assert "".join(each.text for each in before) + last.final_text == output.text
