"""Bad words and allowed tokens: which logits they leave, however much of the output the host knows."""

import random

import pytest
import torch
from tokenizers import Tokenizer as CoreTokenizer
from tokenizers import models, pre_tokenizers

from ingine.engine.kernels.native.sampling import NATIVE_SAMPLING
from ingine.engine.kernels.sampling.interface import TORCH_SAMPLING
from ingine.engine.request import EngineRequest
from ingine.engine.sample.processors import process
from ingine.engine.text.bad_words import encode_bad_words
from ingine.engine.text.tokenizer import Tokenizer
from ingine.errors import ErrorCode, InvalidRequest
from ingine.sampling_params import SamplingParams
from tests.engine.conftest import LoadedModel
from tests.engine.driving import Driver, make_engine, run_one
from tests.engine.marks import needs_native
from tests.engine.sampling_cases import EOS, TRUNCATIONS, make_logits, make_sequence, sample_one
from tests.engine.test_resume import PARAMS, PROMPT

VOCAB_SIZE = 12
PENALTIES = {"repetition_penalty": 1.7, "frequency_penalty": 0.9}


def forbidden_by_definition(words: list[list[int]], output: list[int]) -> set[int]:
    return {
        word[-1]
        for word in words
        if len(word) <= len(output) + 1 and output[len(output) - len(word) + 1 :] == word[:-1]
    }


def some_words(rng: random.Random) -> list[list[int]]:
    """Words that share beginnings and ends; some have a token beyond the vocabulary."""
    return [
        [
            rng.choice((3, 4, 5, VOCAB_SIZE + 1)) if rng.random() < 0.9 else rng.randrange(VOCAB_SIZE)
            for _ in range(n)
        ]
        for n in rng.choices(range(1, 5), k=rng.randrange(8))
    ]


@pytest.mark.parametrize("seed", range(60))
def test_masks_are_those_of_the_definition_also_behind_a_pending_token(seed):
    rng = random.Random(seed)
    seqs, masks = [], []
    outputs = [[rng.choice((3, 4, 5)) for _ in range(rng.randrange(6))] for _ in range(5)]
    for output in outputs:
        words = some_words(rng)
        allowed = rng.choice((None, tuple(rng.sample(range(VOCAB_SIZE), 4))))
        is_behind = bool(output) and rng.random() < 0.6
        extra = rng.choice(({}, PENALTIES))
        known = output[:-1] if is_behind else output
        seqs.append(make_sequence(known, words=words, allowed_token_ids=allowed, **extra))
        seqs[-1].num_pending_tokens = int(is_behind)
        masks.append(
            {i for i in range(VOCAB_SIZE) if allowed is not None and i not in allowed}
            | {i for i in forbidden_by_definition(words, output) if i < VOCAB_SIZE}
        )
    logits = make_logits(5, seed=seed, vocab_size=VOCAB_SIZE)
    pending = torch.tensor(
        [out[-1] if s.num_pending_tokens else -1 for s, out in zip(seqs, outputs, strict=True)]
    )
    got = process(logits.clone(), seqs, pending)
    for row, mask in zip(got, masks, strict=True):
        assert set(torch.nonzero(row == -torch.inf).flatten().tolist()) == mask
    free = [
        make_sequence(out, **dict(PENALTIES if s.token_counts else {}))
        for s, out in zip(seqs, outputs, strict=True)
    ]
    expected = process(logits.clone(), free)
    assert torch.equal(got.where(got > -torch.inf, 0), expected.where(got > -torch.inf, 0))


def test_the_prompt_is_no_part_of_a_word():
    """As in vLLM: only what is generated counts."""
    row = process(torch.zeros(1, VOCAB_SIZE), [make_sequence(prompt=[3, 4], words=[[4, 5]])])
    assert row.isfinite().all()


def test_a_row_that_broke_forbids_nothing_in_another():
    seqs = [make_sequence([3], words=[[3, 4, 5]]) for _ in range(3)]
    for seq in seqs:
        seq.num_pending_tokens = 1
    got = process(torch.zeros(3, VOCAB_SIZE), seqs, torch.tensor([4, -1, 4]))
    assert torch.nonzero(got == -torch.inf).tolist() == [[0, 5], [2, 5]]


def test_a_draft_is_checked_at_each_of_its_positions():
    seq = make_sequence([3], words=[[3, 4, 5], [4, 5, 6], [7]])
    forbidden = [row.processing.bad_words.forbidden(row.output_tail).tolist() for row in seq.ahead([4, 5, 6])]
    assert forbidden == [[7, 5], [7, 6], [7]]
    assert not any(row.is_plain for row in seq.ahead([4, 5]))


@pytest.mark.parametrize("cut", [{}, *TRUNCATIONS], ids=str)
@pytest.mark.parametrize(
    "sampling",
    [TORCH_SAMPLING, pytest.param(NATIVE_SAMPLING, marks=needs_native)],
    ids=lambda sampling: sampling.name,
)
def test_only_allowed_tokens_are_drawn_whatever_is_cut(sampling, cut):
    """Nearly all of the row is -inf, and fewer tokens than top_k are left."""
    allowed = (5, 1000, 5999)
    drawn = {
        sample_one(
            make_logits(), make_sequence(temperature=3.0, seed=s, allowed_token_ids=allowed, **cut), sampling
        )
        for s in range(10)
    }
    assert drawn <= {*allowed} and drawn
    greedy = sample_one(make_logits(), make_sequence(allowed_token_ids=allowed), sampling)
    assert greedy == max(allowed, key=lambda i: make_logits()[0, i])


# ------------------------------------------------------------------------------------ in the engine


def test_no_bad_word_is_generated_and_only_allowed_tokens(llama):
    params = PARAMS["restricted"].model_copy(update={"max_tokens": 100})
    engine = make_engine(llama)
    for seed in range(5):
        result = run_one(engine, PROMPT, params.model_copy(update={"seed": seed}))
        assert set(result.text) <= set("abcd") and len(result.text) == 100
        assert not [word for word in params.bad_words if word in result.text]
    free = params.model_copy(update={"bad_words": ()})
    text = run_one(engine, PROMPT, free).text
    assert {word for word in params.bad_words if word in text}, "some would come otherwise"


EMPTY = {
    "all that is allowed is bad": {"allowed_token_ids": (64,), "bad_words": ("a",)},
    "after a prefix": {"allowed_token_ids": (64,), "bad_words": ("aaa",)},
    "nothing but the end is allowed": {
        "allowed_token_ids": (EOS,),
        "stop_token_ids": (EOS,),
        "min_tokens": 2,
    },
}


@pytest.mark.parametrize("options", [{}, {"async_scheduling": True}, {"speculation": "ngram"}], ids=str)
@pytest.mark.parametrize("fields", EMPTY.values(), ids=EMPTY.keys())
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_empty_mask_ends_its_own_sequence_with_a_code(llama: LoadedModel, fields, options, temperature):
    alone = run_one(make_engine(llama), PROMPT, PARAMS["penalties"])
    driver = Driver(make_engine(llama, **options))
    driver.engine.add(EngineRequest("free", PROMPT, PARAMS["penalties"]))
    params = SamplingParams(temperature=temperature, seed=1, max_tokens=9, **fields)
    driver.engine.add(EngineRequest("empty", PROMPT, params))
    ends = []
    while driver.engine.has_unfinished:
        ends += [output for output in driver.step() if output.finish_reason is not None]
    [empty] = [output for output in ends if output.seq_id == "empty"]
    assert (empty.finish_reason, empty.error_code) == ("error", ErrorCode.NO_ALLOWED_TOKEN)
    assert driver.results["empty"].token_ids == ([64, 64] if fields.get("bad_words") == ("aaa",) else [])
    assert f"after output token {empty.position}" in empty.stop_reason
    assert driver.results["free"].token_ids == alone.token_ids


# -------------------------------------------------------------------------------- the words' tokens


def a_tokenizer() -> Tokenizer:
    vocab = {token: index for index, token in enumerate(["a", "b", " ", "ab", " a", " b", " ab", "x", "?"])}
    core = CoreTokenizer(models.BPE(vocab=vocab, merges=[("a", "b"), (" ", "ab"), (" ", "b")], unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_next")
    return Tokenizer(core)


def test_words_are_spelled_as_they_begin_a_text_and_as_they_follow_a_space():
    tokenizer = a_tokenizer()
    assert encode_bad_words(tokenizer, ["ab"]) == [[3], [6]]
    assert encode_bad_words(tokenizer, ["  ab"]) == [[3], [6]]  # as in vLLM: leading spaces do not count
    assert encode_bad_words(tokenizer, ["b", "xa"]) == [[1], [5], [7, 0]]  # " x" is two tokens: " " and x


def test_a_word_without_tokens_is_refused():
    core = CoreTokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    with pytest.raises(InvalidRequest, match="no tokens") as refused:
        encode_bad_words(Tokenizer(core), ["zzz"])
    assert refused.value.code == ErrorCode.INVALID_PARAMETER


def test_an_engine_without_a_tokenizer_refuses_words(llama):
    engine = make_engine(llama)
    engine.tokenizer = None
    with pytest.raises(InvalidRequest, match="no tokenizer"):
        engine.add(EngineRequest("a", PROMPT, SamplingParams(bad_words=("a",))))
