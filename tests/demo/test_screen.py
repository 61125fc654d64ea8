"""The demo's screen fits a terminal of any size, and no output of a model can break it."""

import io

import pytest
from rich.console import Console

from ingine.demo.prompts import QUESTIONS
from ingine.demo.screen import LiveScreen, PlainScreen, grid_shape, open_screen
from ingine.demo.streams import Stream


@pytest.fixture
def streams() -> list[Stream]:
    streams = [Stream(number, question, f"job-{number}", 0.0) for number, question in enumerate(QUESTIONS)]
    for stream in streams[:20]:
        stream.seen, stream.text = [(40, list(range(40)))], "word " * 200
    streams[3].interrupted_at = 40
    streams[4].interrupted_at = 20
    streams[5].ending = "finished"
    streams[6].ending = "JobFailed: engine_error"
    return streams


def picture(streams: list[Stream], width: int, height: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=True, color_system=None)
    with LiveScreen(console, streams) as screen:
        screen.say("something happened")
        rendered = screen.render(width, height)
    lines = console.render_lines(rendered, console.options.update(width=width, height=None), pad=False)
    return ["".join(segment.text for segment in line) for line in lines]


@pytest.mark.parametrize(
    ("width", "height"), [(20, 2), (20, 5), (33, 7), (34, 10), (80, 24), (81, 25), (120, 50), (300, 80)]
)
def test_it_fits(streams, width, height):
    lines = picture(streams, width, height)
    assert 0 < len(lines) <= height
    assert max(map(len, lines)) <= width
    assert "2/36 finished" in lines[-1] or width < 40


def test_streams_grow_side_by_side(streams):
    text = "\n".join(picture(streams, 120, 50))
    assert text.count("40 tokens") > 10
    assert "went on after 20" in text and "worker killed" in text


def test_control_characters_of_a_model_do_not_reach_the_terminal(streams):
    streams[0].text = "\x1b[2J\x1b[H bell\x07"
    assert not any("\x1b" in line or "\x07" in line for line in picture(streams, 80, 24))


@pytest.mark.parametrize("terminal", ["xterm", "dumb"])
def test_control_characters_in_messages_are_shown(streams, terminal):
    written = io.StringIO()
    options = {"width": 80, "height": 24, "color_system": None, "_environ": {"TERM": terminal}}
    with open_screen(Console(file=written, force_terminal=True, **options), streams) as screen:
        screen.say("an error: \x1b]0;owned\x07\x9b31m")
    assert "\x1b]0;" not in written.getvalue() and "\x9b" not in written.getvalue()
    assert r"\x1b]0;owned\x07\x9b31m" in written.getvalue()


def test_a_stream_keeps_its_cell_until_it_ends(streams):
    screen = LiveScreen(Console(file=io.StringIO(), force_terminal=True), streams)
    columns, rows, _ = grid_shape(80, 20)
    before = list(screen._choose(columns * rows))
    assert list(screen._choose(columns * rows)) == before
    before[0].ending = "finished"
    after = screen._choose(columns * rows)
    assert before[0] not in after and after[1:] == before[1:]


@pytest.mark.parametrize("options", [{}, {"force_terminal": True, "_environ": {"TERM": "dumb"}}])
def test_plain_lines_without_a_real_terminal(options, streams):
    assert isinstance(open_screen(Console(file=io.StringIO(), **options), streams), PlainScreen)
