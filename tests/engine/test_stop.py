"""Stop strings, against the obvious way: look for them in the whole text, one character more at a time."""

from hypothesis import given
from hypothesis import strategies as st

from ingine.stop import StopStrings


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
