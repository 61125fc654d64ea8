"""Sampling parameters: what users of vLLM may pass, what is refused by name, and which fields were set."""

from enum import Enum

import pytest
from pydantic import ValidationError

from ingine.sampling_params import (
    MAX_ALLOWED_TOKEN_IDS,
    MAX_BAD_WORD_CHARS,
    MAX_BAD_WORDS,
    MAX_LOGIT_BIASES,
    MAX_STOP_CHARS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    NEUTRAL_PARAMS,
    SamplingParams,
)


class RequestOutputKind(Enum):
    """The enumeration of the same name in vLLM."""

    CUMULATIVE = 0
    DELTA = 1


VLLM_DEFAULTS = {
    "n": 1,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "seed": None,
    "stop": None,
    "stop_token_ids": None,
    "bad_words": None,
    "ignore_eos": False,
    "max_tokens": None,
    "min_tokens": 0,
    "logprobs": None,
    "prompt_logprobs": None,
    "detokenize": True,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "include_stop_str_in_output": False,
    "output_kind": RequestOutputKind.CUMULATIVE,
    "truncate_prompt_tokens": None,
    "structured_outputs": None,
    "guided_decoding": None,
    "logit_bias": None,
    "allowed_token_ids": None,
    "logits_processors": None,
    "extra_args": None,
    "best_of": None,
    "use_beam_search": False,
    "length_penalty": 1.0,
    "early_stopping": False,
}


def test_vllms_defaults_mean_nothing():
    params = SamplingParams(**VLLM_DEFAULTS)
    assert params == SamplingParams()
    assert params.max_tokens is None


@pytest.mark.parametrize("name", NEUTRAL_PARAMS)
def test_none_means_nothing_everywhere(name):
    assert SamplingParams(**{name: None}).given() == {}


@pytest.mark.parametrize("name", sorted(SamplingParams.model_fields))
def test_none_is_as_if_not_given(name):
    assert SamplingParams(**{name: None}).given() == {}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("best_of", 3),
        ("use_beam_search", True),
        ("logits_processors", [len]),
        ("guided_decoding", {"regex": "x"}),
        ("output_kind", RequestOutputKind.DELTA),
    ],
)
def test_what_would_change_the_output_is_refused_by_name(name, value):
    with pytest.raises(ValidationError) as refused:
        SamplingParams(**{name: value})
    [fault] = refused.value.errors()
    assert fault["loc"] == (name,) and "not supported" in fault["msg"]


def test_an_unknown_name_is_refused_even_if_it_is_none():
    with pytest.raises(ValidationError, match="max_tokenz"):
        SamplingParams(max_tokenz=None)


def test_what_was_set_is_known_even_where_it_is_the_default():
    assert SamplingParams(temperature=1.0, n=1, stop="x").given() == {"temperature": 1.0, "stop": ("x",)}
    assert SamplingParams().given() == {}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"stop_token_ids": [1] * (MAX_STOP_TOKEN_IDS + 1)}, f"at most {MAX_STOP_TOKEN_IDS} stop token ids"),
        ({"stop": ["x"] * (MAX_STOP_STRINGS + 1)}, f"at most {MAX_STOP_STRINGS} stop strings"),
        ({"stop": "x" * (MAX_STOP_CHARS + 1)}, f"at most {MAX_STOP_CHARS} characters"),
        ({"bad_words": ["x"] * (MAX_BAD_WORDS + 1)}, f"at most {MAX_BAD_WORDS} bad words"),
        ({"bad_words": ["x" * (MAX_BAD_WORD_CHARS + 1)]}, f"at most {MAX_BAD_WORD_CHARS} characters"),
        (
            {"allowed_token_ids": [1] * (MAX_ALLOWED_TOKEN_IDS + 1)},
            f"at most {MAX_ALLOWED_TOKEN_IDS} allowed token ids",
        ),
        ({"logit_bias": dict.fromkeys(range(MAX_LOGIT_BIASES + 1), 1.0)}, f"at most {MAX_LOGIT_BIASES}"),
    ],
)
def test_every_list_is_bounded(fields, says):
    with pytest.raises(ValidationError, match=says):
        SamplingParams(**fields)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"allowed_token_ids": []}, "must not be empty"),
        ({"truncate_prompt_tokens": 0}, "must keep a token"),
        ({"truncate_prompt_tokens": -2}, "greater than or equal to -1"),
        ({"allowed_token_ids": [-1]}, "greater than or equal to 0"),
        ({"allowed_token_ids": 7}, "valid tuple"),
        ({"bad_words": [""]}, "a character that is no space"),
        ({"bad_words": ["x", " \t"]}, "a character that is no space"),
        ({"bad_words": "x"}, "valid tuple"),
        ({"bad_words": [7]}, "valid string"),
    ],
)
def test_what_restricts_the_tokens_is_checked(fields, says):
    with pytest.raises(ValidationError, match=says):
        SamplingParams(**fields)


def test_at_the_bounds_they_are_taken():
    params = SamplingParams(
        bad_words=["x" * MAX_BAD_WORD_CHARS] * MAX_BAD_WORDS,
        allowed_token_ids=[*range(MAX_ALLOWED_TOKEN_IDS)],
        stop_token_ids=[*range(MAX_STOP_TOKEN_IDS)],
        stop=["x" * MAX_STOP_CHARS] * MAX_STOP_STRINGS,
    )
    assert len(params.stop_token_ids) == MAX_STOP_TOKEN_IDS


def test_min_tokens_is_compared_with_max_tokens_only_where_there_is_one():
    assert SamplingParams(min_tokens=5).max_tokens is None
    with pytest.raises(ValidationError, match=r"min_tokens \(5\) is over max_tokens \(4\)"):
        SamplingParams(min_tokens=5, max_tokens=4)


def test_a_stop_string_needs_text():
    with pytest.raises(ValidationError, match="leave out detokenize=False"):
        SamplingParams(stop="x", detokenize=False)
    assert not SamplingParams(stop_token_ids=[7], detokenize=False).detokenize
