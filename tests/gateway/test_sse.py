"""Server-sent events, byte by byte."""

from ingine.gateway import sse


def test_an_event_is_one_line_of_json_and_an_empty_line():
    assert sse.event({"a": 'x\n"ü\u2028'}) == 'data: {"a":"x\\n\\"ü\u2028"}\n\n'.encode()


def test_an_event_with_a_position_and_a_kind():
    written = sse.event({}, position="job/3-0", kind="response.created")
    assert written == b"id: job/3-0\nevent: response.created\ndata: {}\n\n"


def test_a_ping_ends_no_event():
    """A client that is in wide use reads `: ping` and an empty line, after an `id:`, as an empty event."""
    assert sse.PING == b": ping\n" and not (sse.PING + sse.event({})).startswith(b": ping\n\n")


def test_the_end():
    assert sse.DONE == b"data: [DONE]\n\n"
