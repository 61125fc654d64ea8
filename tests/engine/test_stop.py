"""Stop strings, against the obvious way: look for them in the whole text, one character more at a time."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingine.engine.text.stop import StopStrings
from ingine.sampling_params import MAX_STOP_CHARS, MAX_STOP_STRINGS


def feed(stops: tuple[str, ...], pieces: list[str]) -> tuple[str, str | None]:
    """All text that comes out, and the stop string."""
    stream, text = StopStrings(stops), ""
    for piece in pieces:
        sure, stop = stream.append(piece)
        text += sure
        if stop is not None:
            return text, stop
    return text + stream.flush(), None


def first_to_be_complete(stops: tuple[str, ...], text: str) -> tuple[str, str | None]:
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


def test_the_text_ends_before_the_stop_string():
    assert feed(("STOP",), ["go STOP here"]) == ("go ", "STOP")


def test_it_is_found_across_the_borders_of_tokens():
    assert feed(("\n\nUser:",), ["yes.", "\n", "\nUs", "er", ": no"]) == ("yes.", "\n\nUser:")


def test_what_may_start_one_is_held_back_and_comes_when_it_is_none():
    stream = StopStrings(("abc",))
    assert stream.append("xab") == ("x", None)
    assert stream.append("d") == ("abd", None)


def test_of_overlapping_ones_the_first_to_be_complete_counts():
    assert feed(("abcd", "bc"), ["abcd"]) == ("a", "bc")
    assert feed(("bc", "abc"), ["xabc"]) == ("x", "abc")


def test_what_is_held_at_the_end_is_flushed_once():
    stream = StopStrings(("abc",))
    stream.append("ab")
    assert [stream.flush(), stream.flush()] == ["ab", ""]


small_text = st.text("ab", max_size=12)


@given(
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=4).map(tuple), st.lists(small_text, max_size=8)
)
def test_the_split_makes_no_difference(stops, pieces):
    assert feed(stops, pieces) == first_to_be_complete(stops, "".join(pieces))


@given(
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=4).map(tuple), st.lists(small_text)
)
def test_nothing_is_held_back_that_cannot_start_one(stops, pieces):
    stream, received, emitted = StopStrings(stops), "", ""
    for piece in pieces:
        sure, stop = stream.append(piece)
        if stop is not None:
            return
        received, emitted = received + piece, emitted + sure
        held = received.removeprefix(emitted)
        assert emitted + held == received
        assert held == "" or any(stop.startswith(held) for stop in stops)


# The longest that are allowed, each of which may begin with the held text at many places.
WORST_STOPS = {
    "differ in their ends": tuple("a" * (MAX_STOP_CHARS - 1) + chr(256 + n) for n in range(MAX_STOP_STRINGS)),
    "differ in their middles": tuple(
        "a" * (MAX_STOP_CHARS // 2 - n) + "b" + "a" * (MAX_STOP_CHARS // 2 + n - 2) + "c"
        for n in range(MAX_STOP_STRINGS)
    ),
    "repeat themselves": tuple(
        ("ab" * MAX_STOP_CHARS)[: MAX_STOP_CHARS - 2 * n - 1] + "c" for n in range(MAX_STOP_STRINGS)
    ),
}


class Counted(str):
    """A stop string that counts how many of its characters are looked at."""

    num_read = 0

    def __getitem__(self, place):
        found = super().__getitem__(place)
        Counted.num_read += len(found)
        return found


@pytest.mark.parametrize("name", WORST_STOPS)
def test_the_longest_stop_strings_cost_a_few_looks_a_character(name):
    stops, text = WORST_STOPS[name], ("a" * 1500 + "ab" * 600) * 2
    stream = StopStrings(tuple(map(Counted, stops)))
    Counted.num_read = 0
    emitted = ""
    for start in range(0, len(text), 5):
        sure, stop = stream.append(text[start : start + 5])
        assert stop is None
        emitted += sure
    assert emitted + stream.flush() == text
    assert 0 < Counted.num_read <= 4 * len(text) * len(stops)


@pytest.mark.parametrize("name", WORST_STOPS)
def test_the_longest_stop_strings_are_found(name):
    stops = WORST_STOPS[name]
    for stop in (stops[0], stops[-1]):
        text = "a" * 1500 + "ab" * 20 + stop + "tail"
        pieces = [text[start : start + 7] for start in range(0, len(text), 7)]
        found = feed(stops, pieces)
        assert found == first_to_be_complete(stops, text)
        assert found[1] is not None
