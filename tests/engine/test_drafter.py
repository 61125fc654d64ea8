"""Drafts: tokens that may follow, guessed from what followed before."""

from ingine.engine.schedule.drafter import Drafter


def guess(text: str, max_tokens: int = 5) -> str:
    """Each letter is a token."""
    drafter = Drafter([ord(letter) for letter in text])
    drafter.catch_up()
    return "".join(map(chr, drafter.draft(max_tokens)))


def test_it_goes_on_as_after_the_same_two_tokens():
    assert guess("the cat sat. the ", 3) == "cat"


def test_of_several_places_the_last_counts():
    assert guess("ab1 ab2 ab", 1) == "2"


def test_nothing_is_guessed_where_nothing_comes_again():
    assert guess("abcdef") == guess("a") == guess("aa") == ""


def test_a_period_is_drawn_out_beyond_the_end():
    assert guess("abcabc", 7) == "abcabca"
    assert guess("aaa", 4) == "aaaa"


def test_a_match_that_holds_is_followed_where_its_last_two_tokens_alone_lead_elsewhere():
    tokens = [ord(letter) for letter in "xyz 1 3. 1 2 xyz"]
    drafter = Drafter(tokens)
    drafter.catch_up()
    tokens += map(ord, " 1 ")  # as guessed; what followed "1 " last is 2, after "xyz 1 " it was 3
    drafter.catch_up()
    assert drafter.draft(1) == [ord("3")]


def test_the_rate_says_how_good_guesses_are_whether_or_not_they_are_used():
    tokens = list(range(40))
    drafter = Drafter(tokens)
    drafter.catch_up()
    unknown = drafter.acceptance_rate
    for token_id in range(40):  # it copies, one token a step
        tokens.append(token_id)
        drafter.catch_up()
    assert unknown < 0.9 < drafter.acceptance_rate

    for never_seen in range(1000, 1040):  # and now the same two are followed by something else each time
        for token_id in (1, 2, never_seen):
            tokens.append(token_id)
            drafter.catch_up()
    assert drafter.acceptance_rate < 0.1


def test_several_tokens_at_once_are_seen_as_one_by_one():
    tokens = [ord(letter) for letter in "she sells sea shells by the sea shore; the shells she sells are sea"]
    seen: list[int] = []
    at_once, one_by_one = Drafter(tokens), Drafter(seen)
    for token_id in tokens:
        seen.append(token_id)
        one_by_one.catch_up()
    at_once.catch_up()
    assert one_by_one.draft(6) and at_once.draft(6) == one_by_one.draft(6)
