"""The grammar of a reasoning model's output begins where the reasoning ends, and holds from there on."""

import random
import re

import numpy as np
import pytest

from ingine.engine.engine import Engine
from ingine.engine.grammar.masks import ConstrainedRows, MaskFiller
from ingine.engine.grammar.reasoning import ReasoningTokens, reasoning_tokens
from ingine.engine.grammar.state import GrammarState
from ingine.engine.grammar.vocabulary import GrammarVocabulary
from ingine.engine.message_format import MessageFormat, ReasoningTags
from ingine.engine.outputs import FinishReason
from ingine.engine.parsers.message_parser import parser_of
from ingine.engine.request import EngineRequest
from ingine.engine.text.tokenizer import Tokenizer
from ingine.errors import ErrorCode, InvalidRequest
from ingine.sampling_params import SamplingParams
from tests.engine.chat_families import byte_level, sentencepiece
from tests.engine.driving import Driver, Result, make_engine, run_one
from tests.engine.grammars import allowed, mask_of, smollm2_compiler, state_of, tiny_compiler
from tests.tiny_models import VOCAB_SIZE

OPEN, CLOSE = "<|im_start|>", "<|endoftext|>"
TAGS = ReasoningTags(OPEN, CLOSE)
NUM_WORDS = -(-VOCAB_SIZE // 32)
PROMPT = list(range(60, 90))
ANSWER = re.compile("(left|right)-[0-9]{2,6}")
ASKED = {"regex": ANSWER.pattern}
PARAMS = SamplingParams(temperature=1.0, seed=2, max_tokens=50, structured_outputs=ASKED)
MODES = {
    "a step at a time": {},
    "a step ahead": {"async_scheduling": True},
    "drafts": {"speculation": "ngram"},
}


def ids(text: str) -> list[int]:
    return tiny_compiler().vocabulary.ll_tokenizer.tokenize_str(text, parse_special=True)


def spelled(text: str) -> list[int]:
    """A token for each byte, also of a special token's name."""
    return [token_id for char in text for token_id in ids(char)]


[OPENING], [CLOSING] = ids(OPEN), ids(CLOSE)
[EOS] = tiny_compiler().vocabulary.eos_token_ids


def make_state(*, has_begun: bool, params: SamplingParams = PARAMS, opening: int | None = OPENING):
    return GrammarState(
        tiny_compiler().compile(params.structured_outputs),
        params,
        eos_token_ids=[EOS],
        reasoning=ReasoningTokens(opening, CLOSING, has_begun),
    )


def mask(state: GrammarState) -> set[int]:
    return {*allowed(mask_of(state, NUM_WORDS))}


def grammar_after(text: str = "") -> set[int]:
    state = state_of(tiny_compiler(), **ASKED)
    assert state.accept(spelled(text))
    return mask(state)


EVERYTHING = {*range(NUM_WORDS * 32)}


def test_within_the_reasoning_everything_is_allowed_but_an_end():
    state = make_state(has_begun=True)
    for token_id in [*spelled("left-1 <|endof"), OPENING, *spelled("x")]:
        assert mask(state) == EVERYTHING - {EOS}
        assert not state.has_begun and state.forced_tokens() == [] and state.matcher is None
        assert state.accept([token_id])
    assert state.accept([CLOSING]) and state.has_begun
    assert mask(state) == grammar_after()
    assert state.accept(spelled("left-12")) and mask(state) == grammar_after("left-12")


def test_the_first_token_alone_may_begin_the_reasoning():
    state = make_state(has_begun=False)
    assert state.forced_tokens() == []
    assert mask(state) == grammar_after() | {OPENING}
    reasoning, answering = state.ahead(), state.ahead()
    assert reasoning.accept([OPENING]) and not reasoning.has_begun
    assert mask(reasoning) == EVERYTHING - {EOS}
    assert answering.accept(spelled("l")) and mask(answering) == grammar_after("l")
    assert not answering.accept([OPENING]) and answering.error


def test_an_output_whose_opening_tag_is_not_one_token_does_not_reason():
    assert mask(make_state(has_begun=False, opening=None)) == grammar_after()


@pytest.mark.parametrize("before", ["", "<", "<<|end", "x<|endoftext"])
def test_no_other_tokens_write_the_closing_tag(before):
    """The message would end its reasoning there, and the grammar would not have begun."""
    state = make_state(has_begun=True)
    rest = spelled(CLOSE[len(before.lstrip("x").replace("<<", "<")) :])
    assert state.accept([*spelled(before), *rest[:-1]])
    assert mask(state) == EVERYTHING - {EOS, rest[-1]}
    interrupted, written = state.ahead(), state.ahead()
    assert not written.accept(rest[-1:]) and "in pieces" in written.error
    assert interrupted.accept([OPENING]) and mask(interrupted) == EVERYTHING - {EOS}
    unknown = state.ahead()
    assert unknown.accept([VOCAB_SIZE + 1])  # a token without text
    assert rest[-1] not in mask(unknown)


@pytest.mark.parametrize("family", [byte_level, sentencepiece])
def test_a_token_that_completes_the_tag_with_more_behind_it_is_forbidden_too(family):
    core = family("x")
    core.add_tokens(["x</think>\n", "ink>", "k> and"])
    tokenizer = Tokenizer.from_transformers(core)
    vocabulary = GrammarVocabulary(tokenizer, vocab_size=tokenizer.num_tokens, eos_token_ids=[5])
    [closing] = tokenizer.encode_word("</think>")
    tokens = reasoning_tokens(MessageFormat(reasoning=ReasoningTags("<think>", "</think>")), vocabulary)
    assert tokens == ReasoningTokens(*tokenizer.encode_word("<think>"), closing, False)
    spellings = vocabulary.spellings(closing)
    around, ink, k = (core.convert_tokens_to_ids(text) for text in ("x</think>\n", "ink>", "k> and"))
    last = core.convert_tokens_to_ids(">")
    assert {*spellings.completed_by(b"")} == {around}
    assert {*spellings.completed_by(b"</th")} == {around, ink}
    assert {*spellings.completed_by(b"x</thin")} == {around, k}
    assert {*spellings.completed_by(b"</think")} == {around, last, *spellings.completed_by(b"")} | {
        token_id
        for token_id in range(tokenizer.num_tokens)
        if vocabulary.token_bytes(token_id).startswith(b">")
    }


def test_a_closing_tag_of_several_tokens_leaves_the_grammar_from_the_start_on():
    vocabulary = smollm2_compiler().vocabulary
    format = MessageFormat(reasoning=ReasoningTags("<think>", "</think>"))
    assert reasoning_tokens(format, vocabulary) is None
    assert reasoning_tokens(None, vocabulary) is None
    assert reasoning_tokens(MessageFormat(), vocabulary) is None
    inside = MessageFormat(reasoning=format.reasoning, starts_in_reasoning=True)
    with pytest.raises(InvalidRequest, match="</think>") as refused:
        reasoning_tokens(inside, vocabulary)
    assert refused.value.code == ErrorCode.UNSUPPORTED_GRAMMAR


WHOLE = [OPENING, *spelled("hm <|endoftex"), CLOSING, *spelled("right-01"), EOS]


@pytest.mark.parametrize("has_begun", [True, False])
def test_the_state_is_a_function_of_the_tokens(has_begun):
    """Read one by one, at once, rolled back, and ahead: the same masks, bit for bit."""
    expected, state = [], make_state(has_begun=has_begun)
    for token_id in WHOLE:
        expected.append(mask_of(state, NUM_WORDS))
        assert token_id in allowed(expected[-1]) and state.accept([token_id])
    for position in range(len(WHOLE)):
        resumed, rolled, ahead = (make_state(has_begun=has_begun) for _ in range(3))
        assert resumed.accept(WHOLE[:position])
        assert rolled.accept(WHOLE[: len(WHOLE) - 1])
        rolled.rollback(len(WHOLE) - 1 - position)
        assert ahead.accept(WHOLE[: position // 2])
        copied = ahead.ahead()
        assert copied.accept(WHOLE[position // 2 : position])
        for each in (resumed, rolled, copied):
            np.testing.assert_array_equal(mask_of(each, NUM_WORDS), expected[position])
        np.testing.assert_array_equal(mask_of(ahead, NUM_WORDS), expected[position // 2])


def test_what_failed_is_taken_back():
    state = make_state(has_begun=True)
    assert not state.accept([*spelled("a"), EOS]) and "ends within" in state.error
    state.rollback(1)
    assert state.error is None and mask(state) == EVERYTHING - {EOS}


@pytest.mark.parametrize("has_begun", [True, False])
def test_each_drafted_position_has_a_mask_of_its_own_across_the_boundary(has_begun):
    filler = MaskFiller()
    for start in range(len(WHOLE) - 2):
        draft = WHOLE[start:-1]
        state, stepwise = (make_state(has_begun=has_begun) for _ in range(2))
        assert state.accept(WHOLE[:start]) and stepwise.accept(WHOLE[:start])
        assert state.num_allowed(draft) == len(draft)
        free = make_state(has_begun=False)
        found = filler.fill([ConstrainedRows(0, free), ConstrainedRows(1, state, draft)])
        assert found.rows.tolist() == list(range(len(draft) + 2))
        np.testing.assert_array_equal(found.masks[0], mask_of(free, NUM_WORDS))
        for row, token_id in zip(found.masks[1:], WHOLE[start:], strict=True):
            np.testing.assert_array_equal(row, mask_of(stepwise, NUM_WORDS))
            assert stepwise.accept([token_id])
    filler.close()


def test_a_draft_is_cut_where_the_grammar_behind_the_reasoning_forbids_it():
    state = make_state(has_begun=True)
    assert state.num_allowed([*spelled("hm"), CLOSING, *spelled("lexx")]) == 5
    assert state.num_allowed([*spelled("hm"), CLOSING]) == 3
    assert state.num_allowed(spelled("hm")) == 2
    state = make_state(has_begun=False)
    assert state.num_allowed([OPENING, CLOSING, *spelled("lx")]) == 3
    assert state.num_allowed(spelled("lx")) == 1


def test_a_draft_that_ends_within_the_reasoning_has_no_next_token_there():
    filler = MaskFiller()
    found = filler.fill([ConstrainedRows(0, make_state(has_begun=True), [*spelled("a"), EOS, CLOSING])])
    filler.close()
    assert [bool(row.any()) for row in found.masks] == [True, True, False, False]


def test_min_tokens_counts_the_reasoning():
    params = PARAMS.model_copy(update={"min_tokens": 6})
    state = make_state(has_begun=True, params=params)
    assert state.accept([CLOSING, *spelled("left")]) and state.accept(spelled("-12"))
    assert EOS in mask(state)
    short = SamplingParams(min_tokens=9, structured_outputs={"regex": "a{1,20}"})
    state = make_state(has_begun=True, params=short)
    assert state.accept([CLOSING, *spelled("a")]) and EOS not in mask(state)


# ------------------------------------------------------------------------------------- in an engine


def message(*, starts: bool) -> MessageFormat:
    return MessageFormat(reasoning=TAGS, starts_in_reasoning=starts)


CLOSES = {CLOSING: 4.0, OPENING: 1.0}
"""A bias, since a random model would hardly ever end its reasoning."""
CASES = {
    f"{name} {kind}": (starts, PARAMS.model_copy(update={"logit_bias": bias} | sampling))
    for name, starts, bias in (
        ("in the prompt", True, CLOSES),
        ("in the output", False, CLOSES | {OPENING: 30.0}),
        ("no reasoning", False, CLOSES | {OPENING: -30.0}),
    )
    for kind, sampling in {
        "random": {},
        "greedy": {"temperature": 0.0, "repetition_penalty": 1.2, "min_tokens": 12, "logprobs": 1},
    }.items()
}


def request(name: str, case: str, **more) -> EngineRequest:
    starts, params = CASES[case]
    return EngineRequest(name, PROMPT, params, message=message(starts=starts), **more)


@pytest.fixture(scope="module")
def alone(llama) -> dict[str, Result]:
    """What each of CASES gives by itself, without drafts."""
    results = {}
    for case, (starts, params) in CASES.items():
        engine = make_engine(llama)
        engine._scheduler.max_forced_draft = 0
        results[case] = run_one(engine, PROMPT, params, message=message(starts=starts))
    return results


def answer_of(case: str, token_ids: list[int]) -> list[int] | None:
    """The tokens of the answer; None where the reasoning has not ended."""
    if case.startswith("no reasoning"):
        return token_ids
    return token_ids[token_ids.index(CLOSING) + 1 :] if CLOSING in token_ids else None


def test_every_output_is_reasoning_and_then_of_the_grammar(llama, alone):
    num_answers = 0
    for case, result in alone.items():
        answer = answer_of(case, result.token_ids)
        if result.finish_reason is not FinishReason.STOP:
            assert result.finish_reason is FinishReason.LENGTH
            continue
        num_answers += 1
        assert ANSWER.fullmatch(llama.tokenizer.decode(answer)), case
        if case.startswith("in the output"):
            assert result.token_ids[0] == OPENING
    assert num_answers >= 4


def same(ours: Result, expected: Result, start: int = 0) -> bool:
    return (
        ours.token_ids == expected.token_ids[start:]
        and ours.finish_reason == expected.finish_reason
        and (start > 0 or ours.text == expected.text)
    )


@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
def test_in_a_batch_each_is_as_alone(llama, alone, options):
    engine = make_engine(llama, max_num_seqs=32, max_num_batched_tokens=64, **options)
    free = SamplingParams(temperature=1.0, seed=7, max_tokens=40, ignore_eos=True)
    for case in CASES:
        engine.add(request(case, case))
        engine.add(EngineRequest(f"free {case}", PROMPT[:7], free))
    results = Driver(engine).finish()
    assert [case for case in CASES if not same(results[case], alone[case])] == []


@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
@pytest.mark.parametrize("case", ["in the prompt random", "in the output greedy", "no reasoning random"])
def test_resumed_at_every_token_it_goes_on(llama, alone, case, options):
    engine, whole = make_engine(llama, max_num_seqs=100, max_num_batched_tokens=200, **options), alone[case]
    for position in range(len(whole.token_ids) + 1):
        engine.add(request(str(position), case, output_token_ids=whole.token_ids[:position]))
    results = Driver(engine).finish()
    for position in range(len(whole.token_ids) + 1):
        assert same(results[str(position)], whole, position), position


@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
def test_preempted_it_goes_on(llama, alone, options):
    engine = make_engine(llama, num_blocks=26, **options)
    for case in CASES:
        engine.add(request(case, case))
    while engine.stats().num_compiling:
        engine._requests.compiling.wait()
        engine._requests.take_compiled()
    results = Driver(engine).finish()
    assert engine.stats().num_preemptions
    assert [case for case in CASES if not same(results[case], alone[case])] == []


def test_drafts_that_repeat_an_earlier_output_cross_the_boundary(llama, alone):
    """The prompt contains the output, so prompt lookup drafts the closing tag and the answer."""
    starts, params = CASES["in the prompt random"]
    tape = alone["in the prompt random"].token_ids
    prompt = [*PROMPT, *tape, *PROMPT]
    options = {"max_model_len": 400, "max_num_batched_tokens": 200}

    def finish(engine: Engine) -> Result:
        return run_one(engine, prompt, params, message=message(starts=starts))

    plain, drafted = make_engine(llama, **options), make_engine(llama, speculation="ngram", **options)
    plain._scheduler.max_forced_draft = 0
    speculator, rng = drafted._speculator, random.Random(3)
    # The true output is drafted in pieces of any length, with a wrong token now and then.
    expected = finish(plain)

    def draft(seqs, room):
        drafts = []
        for seq in seqs:
            rest = expected.token_ids[seq.num_output_tokens :][: rng.randrange(1, 9)][: max(room, 0)]
            rest = rest[: max(0, seq.max_num_tokens - seq.num_tokens - 1)]
            if rest and rng.random() < 0.3:
                rest[rng.randrange(len(rest))] = rng.choice([EOS, CLOSING, OPENING, 7])
            drafts.append(rest)
        return drafts

    speculator.draft = draft
    assert same(finish(drafted), expected)
    assert drafted.stats().num_accepted_tokens > 5


def test_the_parser_and_the_grammar_agree_where_the_answer_begins(llama, alone):
    for case, result in alone.items():
        if result.finish_reason is not FinishReason.STOP:
            continue
        parser = parser_of(message(starts=CASES[case][0]))
        names = {OPENING: OPEN, CLOSING: CLOSE, EOS: ""}
        for token_id in result.token_ids:
            parser.feed(names[token_id] if token_id in names else llama.tokenizer.decode([token_id]))
        parser.flush()
        assert ANSWER.fullmatch(parser.message().content), case


def test_a_prompt_within_reasoning_that_no_token_closes_ends_with_a_code(llama):
    format = MessageFormat(reasoning=ReasoningTags("<think>", "</think>"), starts_in_reasoning=True)
    engine, codes = make_engine(llama), {}
    engine.add(EngineRequest("bad", PROMPT, PARAMS, message=format))
    engine.add(EngineRequest("free", PROMPT, SamplingParams(max_tokens=5)))
    while engine.has_unfinished:
        codes |= {output.seq_id: output.error_code for output in engine.step() if output.finish_reason}
    assert codes == {"bad": ErrorCode.UNSUPPORTED_GRAMMAR, "free": None}


def test_a_log_that_ends_its_reasoning_in_pieces_is_refused(llama):
    engine, ends = make_engine(llama), []
    forged = [*spelled("x"), *spelled(CLOSE), *spelled("y")]
    engine.add(EngineRequest("bad", PROMPT, PARAMS, message=message(starts=True), output_token_ids=forged))
    while engine.has_unfinished:
        ends += [output.error_code for output in engine.step() if output.finish_reason]
    assert ends == [ErrorCode.GRAMMAR_FAILED]
