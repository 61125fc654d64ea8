"""Output tokens become text, and the output ends: against the obvious way, which looks at the whole text."""

import codecs
import subprocess
import sys
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingine.engine.text.output_text import OutputText
from ingine.sampling_params import SamplingParams

EOS = 0
PIECES = (b"</s>", b"a", b"b", b"ab", b"ba", "é".encode()[:1], "é".encode()[1:], b"a" + "é".encode()[:1], b"")
"""The bytes of each token: letters that stop strings are made of, and halves of a character."""


class Tokenizer:
    """Token i is `PIECES[i]`, and 0 is special."""

    def token_bytes(self, token_id: int, *, first: bool) -> bytes | None:
        return None if token_id == EOS else PIECES[token_id]

    def special_token(self, token_id: int) -> str:
        return PIECES[token_id].decode()

    def special_token_bytes(self, token_id: int, *, first: bool) -> bytes | None:
        return PIECES[token_id] if token_id == EOS else None


@dataclass
class Outcome:
    texts: list[str]
    """One for each token up to the end."""
    final_text: str
    finish_reason: str | None
    stop_reason: int | str | None

    @property
    def text(self) -> str:
        return "".join(self.texts) + self.final_text


def make(params: SamplingParams, *, max_tokens: int = 100, tokenizer: Tokenizer | None = None) -> OutputText:
    eos_token_ids = frozenset({EOS})
    return OutputText(
        params, max_tokens=max_tokens, eos_token_ids=eos_token_ids, tokenizer=tokenizer or Tokenizer()
    )


def feed(output_text: OutputText, token_ids: list[int]) -> Outcome:
    """Append tokens up to the end of the output, or of the list."""
    texts = []
    for token_id in token_ids:
        if output_text.finish_reason is not None:
            break
        texts.append(output_text.append(token_id))
    return Outcome(texts, output_text.flush(), output_text.finish_reason, output_text.stop_reason)


def text_of(token_ids: list[int], params: SamplingParams, *, final: bool) -> str:
    if not params.detokenize:
        return ""
    shown = [token_id for token_id in token_ids if token_id != EOS or not params.skip_special_tokens]
    utf8 = codecs.getincrementaldecoder("utf-8")("replace")
    return utf8.decode(b"".join(PIECES[token_id] for token_id in shown), final=final)


def by_definition(params: SamplingParams, token_ids: list[int]) -> tuple[str, str | None, int | str | None]:
    """The whole text, finish reason and stop reason."""
    ends = {*params.stop_token_ids} | (set() if params.ignore_eos else {EOS})
    includes_stop = params.include_stop_str_in_output
    not_searched = text_of(token_ids[: params.min_tokens], params, final=False)
    searched = ""
    for position, token_id in enumerate(token_ids, start=1):
        if token_id in ends:
            text = text_of(token_ids[: position - (not includes_stop)], params, final=True)
            return text, "stop", token_id if token_id in params.stop_token_ids else None
        if position > params.min_tokens:
            whole = text_of(token_ids[:position], params, final=False)[len(not_searched) :]
            for end in range(len(searched) + 1, len(whole) + 1):
                if found := [stop for stop in params.stop if whole[:end].endswith(stop)]:
                    stop = max(found, key=len)
                    length = end if includes_stop else end - len(stop)
                    return not_searched + whole[:length], "stop", stop
            searched = whole
        if position == params.max_tokens:
            return text_of(token_ids[:position], params, final=True), "length", None
    return text_of(token_ids, params, final=True), None, None


@st.composite
def some_params(draw) -> SamplingParams:
    min_tokens = draw(st.integers(0, 6))
    stop = draw(st.lists(st.text("abé", min_size=1, max_size=4), max_size=3))
    return SamplingParams(
        stop=stop,
        detokenize=bool(stop) or draw(st.booleans()),
        skip_special_tokens=draw(st.booleans()),
        include_stop_str_in_output=draw(st.booleans()),
        stop_token_ids=draw(st.lists(st.sampled_from([EOS, 4]), max_size=2)),
        ignore_eos=draw(st.booleans()),
        min_tokens=min_tokens,
        max_tokens=draw(st.integers(max(1, min_tokens), 16)),
    )


some_tokens = st.lists(st.integers(0, len(PIECES) - 1), max_size=16)


@given(some_params(), some_tokens)
def test_text_and_end_are_those_of_the_definition(params, token_ids):
    outcome = feed(make(params), token_ids)
    assert (outcome.text, outcome.finish_reason, outcome.stop_reason) == by_definition(params, token_ids)


@given(some_params(), some_tokens)
def test_resumed_after_any_token_it_goes_on_as_if_never_interrupted(params, token_ids):
    whole = feed(make(params), token_ids)
    for position in range(len(whole.texts) + 1):
        resumed = make(params)
        replayed = [resumed.append(token_id) for token_id in token_ids[:position]]
        rest = feed(resumed, token_ids[position:])
        assert replayed + rest.texts == whole.texts
        assert (rest.final_text, rest.finish_reason, rest.stop_reason) == (
            whole.final_text,
            whole.finish_reason,
            whole.stop_reason,
        )


@given(some_params(), some_tokens)
def test_the_number_of_tokens_counts_every_token_of_the_ids(params, token_ids):
    output_text = make(params)
    outcome = feed(output_text, token_ids)
    assert output_text.num_tokens == len(outcome.texts)


def test_a_stop_string_is_found_over_the_seam_of_two_tokens():
    outcome = feed(make(SamplingParams(stop="baab")), [1, 4, 3, 1])  # a, ba, ab
    assert (outcome.texts, outcome.final_text) == (["a", "", ""], "")
    assert (outcome.finish_reason, outcome.stop_reason) == ("stop", "baab")


def test_a_stop_string_that_is_included_holds_nothing_back():
    outcome = feed(make(SamplingParams(stop="baab", include_stop_str_in_output=True)), [1, 4, 3, 1])
    assert (outcome.texts, outcome.final_text) == (["a", "ba", "ab"], "")
    outcome = feed(make(SamplingParams(stop="b", include_stop_str_in_output=True)), [4])  # ba: not the a
    assert (outcome.text, outcome.stop_reason) == ("b", "b")


def test_an_included_stop_token_is_shown_unless_special_tokens_are_skipped():
    params = {"stop_token_ids": [4], "include_stop_str_in_output": True}
    assert feed(make(SamplingParams(**params)), [1, 4]).text == "aba"
    assert feed(make(SamplingParams(**params)), [1, EOS]).text == "a"
    assert feed(make(SamplingParams(**params, skip_special_tokens=False)), [1, EOS]).text == "a</s>"


def test_half_a_character_after_a_stop_string_is_not_part_of_the_text():
    outcome = feed(make(SamplingParams(stop="ba")), [2, 7])  # b, a and half an é
    assert (outcome.text, outcome.stop_reason) == ("", "ba")


def test_half_a_character_before_the_end_is_flushed_as_a_replacement():
    outcome = feed(make(SamplingParams()), [1, 5, EOS])
    assert (outcome.texts, outcome.final_text) == (["a", "", ""], "\ufffd")


def test_what_may_start_a_stop_string_is_flushed_at_the_end():
    outcome = feed(make(SamplingParams(stop="abb", max_tokens=2)), [2, 3])
    assert (outcome.texts, outcome.final_text, outcome.finish_reason) == (["b", ""], "ab", "length")


def test_a_stop_string_on_the_last_token_counts_as_stop():
    outcome = feed(make(SamplingParams(stop="ab", max_tokens=1)), [3])
    assert (outcome.finish_reason, outcome.stop_reason) == ("stop", "ab")


def test_the_lower_limit_counts():
    for engine_limit, requested in ((3, None), (3, 50), (50, 3)):
        output_text = make(SamplingParams(max_tokens=requested), max_tokens=engine_limit)
        assert output_text.max_tokens == 3
        outcome = feed(output_text, [1] * 9)
        assert (outcome.text, outcome.finish_reason) == ("aaa", "length")


def test_a_stop_string_in_the_first_min_tokens_does_not_count():
    outcome = feed(make(SamplingParams(stop="ab", min_tokens=3)), [3, 3, 1, 2, 3])  # ab, ab, a | b, ab
    assert (outcome.text, outcome.stop_reason) == ("ababab", "ab")


def test_ignore_eos_goes_on_but_not_past_a_stop_token_of_the_request():
    assert feed(make(SamplingParams(ignore_eos=True)), [EOS, 1]).finish_reason is None
    outcome = feed(make(SamplingParams(ignore_eos=True, stop_token_ids=[EOS])), [1, EOS])
    assert (outcome.text, outcome.finish_reason, outcome.stop_reason) == ("a", "stop", EOS)


def test_the_model_s_own_end_is_no_stop_reason():
    outcome = feed(make(SamplingParams()), [1, EOS])
    assert (outcome.text, outcome.finish_reason, outcome.stop_reason) == ("a", "stop", None)


def test_end_tokens_are_those_of_model_and_request():
    assert make(SamplingParams(stop_token_ids=[4])).end_token_ids == {EOS, 4}
    assert make(SamplingParams(stop_token_ids=[4], ignore_eos=True)).end_token_ids == {4}


@pytest.mark.parametrize(
    ("token_ids", "expected"),
    [([1, 2], None), ([1, EOS, 1], ("stop", None)), ([1, 4], ("stop", 4)), ([1] * 9, ("length", None))],
    ids=["none yet", "end of sequence", "stop token", "length"],
)
def test_without_a_tokenizer_there_is_no_text_and_the_same_end(token_ids, expected):
    params = SamplingParams(stop_token_ids=[4], max_tokens=3)
    output_text = OutputText(params, max_tokens=100, eos_token_ids=frozenset({EOS}))
    logprobs = {"token_id": 1, "top": [[1, -0.1]]}
    output_text.add_token_bytes(logprobs)
    assert logprobs == {"token_id": 1, "top": [[1, -0.1]]}
    outcome = feed(output_text, token_ids)
    assert outcome.text == ""
    found = outcome.finish_reason and (outcome.finish_reason, outcome.stop_reason)
    assert found == expected


def test_logprobs_get_the_bytes_that_each_token_would_add():
    output_text = make(SamplingParams())
    output_text.append(1)
    logprobs = {"token_id": 7, "logprob": -0.1, "top": [[7, -0.1], [EOS, -2.0], [6, -3.0]]}
    output_text.add_token_bytes(logprobs)
    assert bytes(logprobs["bytes"]) == PIECES[7]
    assert [bytes(token) for token in logprobs["top_bytes"]] == [PIECES[7], b"</s>", PIECES[6]]
    assert output_text.append(7) == "a"


def test_it_needs_nothing_of_an_engine():
    """Another engine's tokens can be turned into text by it."""
    code = "import sys, ingine.engine.text.output_text; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    ours = {name for name in loaded.split() if name.startswith("ingine.engine.")}
    text = {f"ingine.engine.text{name}" for name in ("", ".output_text", ".detokenizer", ".stop")}
    assert ours == {*text, "ingine.engine.outputs"}
