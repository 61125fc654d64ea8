"""Guesses by suffix: what they are, what they are made of, and what is remembered of whose outputs."""

import tracemalloc
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingine.engine.schedule.indexed_text import MAX_MATCH, MAX_OCCURRENCES
from ingine.engine.schedule.output_history import END_OF_OUTPUT, OutputHistory
from ingine.engine.schedule.suffix_drafter import SuffixDrafter


def tokens(text: str) -> list[int]:
    """Each letter is a token."""
    return [ord(letter) for letter in text]


def guess(text: str, max_tokens: int = 5, *, outputs: tuple[str, ...] = ()) -> str:
    history = OutputHistory(1000)
    for output in outputs:
        history.add("", tokens(output))
    drafter = SuffixDrafter(tokens(text), "", history)
    drafter.catch_up()
    return "".join(map(chr, drafter.draft(max_tokens)))


def test_it_goes_on_as_after_the_longest_match():
    assert guess("the cat sat. a hat! the cat s", 2) == "at"
    assert guess("see 1. the 2. oh 3. the ", 1) == "2"


def test_of_equal_matches_the_majority_counts_and_of_equal_numbers_the_latest():
    assert guess("_ab1 .ab2 :ab1 ;ab3 !ab", 1) == "1"
    assert guess("_ab1 .ab2 !ab", 1) == "2"


def test_a_period_is_drawn_out_beyond_the_end():
    assert guess("abcabc", 7) == "abcabca"
    assert guess("aaa", 4) == "aaaa"


def test_nothing_is_guessed_where_nothing_comes_again():
    assert guess("abcdef") == guess("a") == guess("aa") == ""


def test_it_goes_on_as_outputs_did_and_not_beyond_their_end():
    assert guess("{{to", outputs=('{"tool": 1}',)) == 'ol": '
    assert guess("{{tool", 9, outputs=('{"tool": 1}', "{x}")) == '": 1}'
    assert guess("zzz: 1", outputs=("zz: 1",)) == ""


def test_a_longer_match_in_an_output_counts_more_than_one_in_the_sequence():
    assert guess("ab1 xyzab", 1) == "1"
    assert guess("ab1 xyzab", 1, outputs=("yzab2",)) == "2"


def test_where_sources_part_those_that_were_right_are_followed():
    history = OutputHistory(1000)
    for output in ("call(a)[end]", "call(b)<end>", "call(b)<end>"):
        history.add("", tokens(output))
    text = tokens("# call")
    drafter = SuffixDrafter(text, "", history)
    drafter.catch_up()
    assert drafter.draft(6) == tokens("(b)<en")
    text += tokens("(a")
    drafter.catch_up()
    assert drafter.draft(3) == tokens(")[e")


def test_a_draft_is_as_long_as_it_is_probable():
    outputs = OutputHistory(1000)
    for output in ("go up there", "go up here", "go on", "go up there"):
        outputs.add("", tokens(output))
    drafter = SuffixDrafter(tokens("_go "), "", outputs)
    drafter.catch_up()
    assert drafter.acceptance_rate == 0.5
    assert drafter.draft(9, 0.5 * 3 / 4) == tokens("u")  # three of four, and half of all guesses are right
    assert drafter.draft(9, 0.5**2 * 3 / 4) == tokens("up")
    assert drafter.draft(9, 0.5**4 * 3 / 4) == tokens("up ")  # two of three say t
    assert drafter.draft(9, 0.5**4 * 3 / 4 * 2 / 3) == tokens("up t")
    assert drafter.draft(9, 0.4) == []


def test_the_rate_says_how_good_guesses_are_whether_or_not_they_are_used():
    text = list(range(40))
    drafter = SuffixDrafter(text, "", OutputHistory(0))
    drafter.catch_up()
    for token_id in range(40):  # it copies, one token a step
        text.append(token_id)
        drafter.catch_up()
    assert drafter.acceptance_rate > 0.9

    for never_seen in range(1000, 1040):  # and now the same two are followed by something else each time
        for token_id in (1, 2, never_seen):
            text.append(token_id)
            drafter.catch_up()
    assert drafter.acceptance_rate < 0.1


# ------------------------------------------------------------------------------- against a definition


class Reference:
    """The same guesses, by looking through all texts at each step."""

    def __init__(self, sequence: list[int], outputs: list[list[int]]):
        self.sequence, self.num_seen = sequence, 0
        self.rate = [1.0, 0.5]
        history = [token for output in outputs for token in [*output, END_OF_OUTPUT]]
        self.texts = {"sequence": sequence, "history": history}
        self.sources: list[tuple[str, int]] = []

    def catch_up(self) -> None:
        for token_id in self.sequence[self.num_seen :]:
            if self.sources:
                guess, _ = self.vote(self.sources, self.texts)
                if guess != END_OF_OUTPUT:
                    self.rate = [0.9 * self.rate[0] + 1, 0.9 * self.rate[1] + (guess == token_id)]
                self.sources = self.go_on(self.sources, self.texts, token_id)
        self.num_seen = len(self.sequence)
        if not self.sources:
            matches = [match for name in self.texts for match in self.matches(name)]
            longest = max((length for _, _, length in matches), default=0)
            self.sources = [(name, position) for name, position, length in matches if length == longest]

    def matches(self, name: str) -> list[tuple[str, int, int]]:
        text, found = self.texts[name], []
        for position in reversed(range(2, len(text))):
            lengths = [
                length
                for length in range(2, MAX_MATCH + 1)
                if position >= length and text[position - length : position] == self.sequence[-length:]
            ]
            if lengths:
                found.append((name, position, max(lengths)))
        return found[:MAX_OCCURRENCES]

    def vote(self, sources: list, texts: dict) -> tuple[int, float]:
        votes = Counter(texts[name][position] for name, position in sources)  # of equal ones the first
        [(guess, num_votes)] = votes.most_common(1)
        return guess, num_votes / len(sources)

    def go_on(self, sources: list, texts: dict, token_id: int) -> list:
        return [(name, at + 1) for name, at in sources if texts[name][at] == token_id]

    def draft(self, max_tokens: int, min_probability: float) -> list[int]:
        texts = self.texts | {"sequence": list(self.sequence)}
        sources, probability, draft = self.sources, 1.0, []
        while sources and len(draft) < max_tokens:
            guess, share = self.vote(sources, texts)
            probability *= self.rate[1] / self.rate[0] * share
            if guess == END_OF_OUTPUT or probability < min_probability:
                break
            draft.append(guess)
            texts["sequence"].append(guess)
            sources = self.go_on(sources, texts, guess)
        return draft


ids = st.integers(0, 3)


@settings(max_examples=300, deadline=None)
@given(
    prompt=st.lists(ids, min_size=1, max_size=40),
    steps=st.lists(st.lists(ids, min_size=1, max_size=4), max_size=30),
    outputs=st.lists(st.lists(ids, min_size=3, max_size=20), max_size=6),
    min_probability=st.sampled_from([0.0, 0.05, 0.2, 0.5]),
)
def test_drafts_are_those_of_a_search_through_all_texts(prompt, steps, outputs, min_probability):
    history, sequence = OutputHistory(10_000), list(prompt)
    for output in outputs:
        history.add("", output)
    ours, reference = SuffixDrafter(sequence, "", history), Reference(sequence, outputs)
    for new_tokens in [[], *steps]:
        sequence += new_tokens
        ours.catch_up()
        reference.catch_up()
        assert ours.draft(6, min_probability) == reference.draft(6, min_probability)
        assert ours.acceptance_rate == pytest.approx(reference.rate[1] / reference.rate[0])


# -------------------------------------------------------------------------------------- what is kept


def num_kept(history: OutputHistory, tenants: set[str]) -> int:
    return sum(len(text.token_ids) for tenant in tenants for text in history.texts(tenant))


@settings(max_examples=200, deadline=None)
@given(
    max_tokens=st.integers(0, 60),
    outputs=st.lists(st.tuples(st.sampled_from("abc"), st.lists(ids, max_size=40)), max_size=30),
)
def test_no_more_is_kept_than_was_allowed_and_the_latest_output_is_there(max_tokens, outputs):
    history = OutputHistory(max_tokens)
    for tenant, output in outputs:
        history.add(tenant, output)
        assert num_kept(history, set("abc")) <= max_tokens
        num_fit = min(len(output), max_tokens // 2 - 1)
        if num_fit >= 3:
            kept = list(history.texts(tenant)[0].token_ids)
            assert kept[-num_fit - 1 :] == [*output[-num_fit:], END_OF_OUTPUT]


def test_the_oldest_are_forgotten_first():
    history = OutputHistory(100)
    for start in range(0, 200, 10):
        history.add("", list(range(start, start + 9)))
    kept = [token for text in reversed(history.texts("")) for token in text.token_ids if token >= 0]
    assert kept[-1] == 198 and kept[0] >= 100
    assert all(after > before for before, after in pairwise(kept))


def test_a_token_costs_no_more_memory_than_the_documents_say():
    """No pair occurs twice in the texts, which belong each to its own tenant, or all to one."""
    for num_tenants in (1, 1000):
        tracemalloc.start()
        history = OutputHistory(20_000)
        for index in range(1000):
            output = [1000 + 64 * index + offset for offset in range(64)]
            history.add(str(index % num_tenants), output)
        num_bytes, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert num_bytes < 250 * 20_000


def test_a_tenant_is_drafted_from_its_own_outputs_alone_unless_all_are_allowed():
    for across_tenants in (False, True):
        history = OutputHistory(1000, across_tenants=across_tenants)
        history.add("a", tokens("the secret is 42"))
        drafts = {}
        for tenant in ("a", "b", ""):
            drafter = SuffixDrafter(tokens(">> secret is "), tenant, history)
            drafter.catch_up()
            drafts[tenant] = drafter.draft(2)
        assert drafts["a"] == tokens("42")
        assert drafts["b"] == drafts[""] == (tokens("42") if across_tenants else [])
