"""What each key does. Nothing is done to a queue, a worker or a job without a confirmation."""

import pytest

from ingine.top.board import Action, Board, Figures, Pane, Verb
from ingine.top.keys import decode_keys
from tests.top.boards import JOBS, Snapshot, board, queue_info


def press(shown: Board, *keys: str) -> list[Action]:
    return [action for key in keys if (action := shown.press(key))]


def test_q_quits():
    assert press(board(), "q") == [Action(Verb.QUIT)]


@pytest.mark.parametrize(
    ("keys", "action"),
    [
        ("p", Action(Verb.PAUSE)),
        ("r", Action(Verb.RESUME)),
        (("down", "down", "c"), Action(Verb.CANCEL, "second")),
        (("up", "c"), Action(Verb.CANCEL, "third")),
        (("tab", "j", "d"), Action(Verb.DRAIN, "gpu-0-a1")),
    ],
)
def test_an_action_is_done_once_it_is_confirmed(keys, action):
    shown = board()
    assert press(shown, *keys) == []
    assert action.target in shown.question and "(y/n)" in shown.question
    assert press(shown, "y") == [action]
    assert not shown.question and press(shown, "y") == []


@pytest.mark.parametrize("answer", ["n", "q", "c", "escape", "down", "Y"])
def test_any_other_key_than_y_abandons_it(answer):
    shown = board()
    assert press(shown, "down", "c", answer, "y") == []
    assert shown.selected == {Pane.JOBS: "first"}


def test_without_a_selection_there_is_nothing_to_cancel_or_drain():
    shown = board()
    assert press(shown, "c", "y", "d", "y") == []
    press(shown, "c")
    assert "select a job first" in shown.message and shown.pane is Pane.JOBS
    press(shown, "d")
    assert "select a worker first" in shown.message and shown.pane is Pane.WORKERS


def test_a_selection_stays_on_its_job_when_the_list_changes():
    shown = board()
    press(shown, "down", "down")
    shown.update(Snapshot(queue_info(), JOBS[1:]), Figures(), 1.0)
    assert shown.selected[Pane.JOBS] == "second"


def test_a_job_that_ends_leaves_no_other_selected():
    shown = board()
    press(shown, "down", "down")
    shown.update(Snapshot(queue_info(), [JOBS[0], JOBS[2]]), Figures(), 1.0)
    assert press(shown, "c", "y") == [] and Pane.JOBS not in shown.selected


def test_a_question_keeps_the_job_that_it_names():
    shown = board()
    press(shown, "down", "c")
    shown.update(Snapshot(queue_info(), JOBS[1:]), Figures(), 1.0)
    assert "first" in shown.question
    assert press(shown, "y") == [Action(Verb.CANCEL, "first")]


def test_moving_stops_at_both_ends_and_needs_rows():
    shown = board()
    press(shown, "pagedown", "pagedown")
    assert shown.selected[Pane.JOBS] == "third"
    press(shown, "pageup")
    assert shown.selected[Pane.JOBS] == "first"
    for empty in (board(jobs=[]), Board("chat")):
        press(empty, "down", "up", "tab", "c", "d", "t")
        assert empty.selected.get(Pane.JOBS) is None


def test_texts_are_shown_only_on_request():
    shown = board()
    assert not shown.show_text
    press(shown, "t")
    assert shown.show_text
    press(shown, "t")
    assert not shown.show_text


def test_keys_of_a_terminal():
    sent = b"\x1b[A\x1b[B\x1bOA\x1bOB\x1b[5~\x1b[6~\tq\x1b"
    assert decode_keys(sent) == ["up", "down", "up", "down", "pageup", "pagedown", "tab", "q", "escape"]
    assert decode_keys(b"\x1b[1;5C\x1b[3~\x00\r\x7f\xff\xc3\xa9") == ["�", "é"]
