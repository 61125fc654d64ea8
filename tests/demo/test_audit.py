"""The demo's audit finds each kind of loss, or its counts would prove nothing."""

import pytest

from ingine.bench.percentile import percentile
from ingine.contract.events import TerminalEvent, TokensEvent, encode_event
from ingine.contract.keys import log_id
from ingine.contract.record import JobStatus
from ingine.demo.audit import Audit, audit
from ingine.demo.prompts import QUESTIONS
from ingine.demo.report import Report
from ingine.demo.streams import Stream


def token_entry(position: int, token_ids: list[int], text: str) -> tuple[str, bytes]:
    return log_id(position), encode_event(TokensEvent(position, token_ids, text))


def terminal_entry(position: int, *, text: str = "", attempts: int = 2) -> tuple[str, bytes]:
    event = TerminalEvent(
        position,
        JobStatus.FINISHED,
        "job",
        text=text,
        usage={"num_output_tokens": position},
        timings={"attempts": attempts},
    )
    return log_id(position, terminal=True), encode_event(event)


LOG = [token_entry(2, [10, 11], "Hel"), token_entry(3, [12], "lo"), terminal_entry(3, text="!")]
SEEN = [(2, [10, 11]), (3, [12])]


def test_what_was_seen_as_it_was_logged_is_intact():
    result = audit(LOG, SEEN, "Hello!")
    assert result.intact and result.num_tokens == 3


def test_chunks_may_be_cut_otherwise_than_the_log():
    assert audit(LOG, [(1, [10]), (3, [11, 12])], "Hello!").intact


@pytest.mark.parametrize(
    ("log", "seen", "text", "fault"),
    [
        (LOG, SEEN[:1], "Hello!", {"num_lost": 1}),
        (LOG, [], "Hello!", {"num_lost": 3}),
        ([LOG[1], LOG[2]], SEEN, "lo!", {"num_lost": 2, "num_wrong": 2}),
        (LOG, [*SEEN, (3, [12])], "Hello!", {"num_repeated": 1}),
        ([*LOG[:2], *LOG[1:]], SEEN, "Hellolo!", {"num_repeated": 1}),
        (LOG, [(2, [10, 99]), (3, [12])], "Hello!", {"num_wrong": 1}),
        (LOG, [*SEEN, (4, [13])], "Hello!", {"num_wrong": 1}),
        ([*LOG, token_entry(4, [13], "")], SEEN, "Hello!", {"num_wrong": 1}),
        ([("9-0", LOG[0][1]), *LOG[1:]], SEEN, "Hello!", {"num_wrong": 1}),
        (LOG, SEEN, "Hello", {"same_text": False}),
        (LOG[:2], SEEN, "Hello", {"terminal": None}),
    ],
    ids=[
        "lost at the end",
        "lost altogether",
        "lost by the log",
        "seen twice",
        "logged twice",
        "another token",
        "a token too many",
        "a token after the end",
        "an entry under another id",
        "the held-back end not seen",
        "never ended",
    ],
)
def test_each_fault_is_found(log, seen, text, fault):
    result = audit(log, seen, text)
    assert {name: getattr(result, name) for name in fault} == fault
    assert not result.intact


def report(*audits: Audit, ending: str = "finished") -> Report:
    streams = [Stream(0, QUESTIONS[0], "job", 0.0, ending=ending) for _ in audits]
    return Report(streams, list(audits), wall_s=1.0)


def test_the_demo_passes_only_if_a_job_was_taken_over_and_all_are_intact():
    taken_over = audit(LOG, SEEN, "Hello!")
    undisturbed = audit([*LOG[:2], terminal_entry(3, text="!", attempts=1)], SEEN, "Hello!")
    lossy = audit(LOG, SEEN[:1], "Hello!")
    assert report(taken_over, undisturbed).passed
    assert not report(undisturbed).passed
    assert not report(taken_over, lossy).passed
    assert not report(taken_over, ending="JobFailed: engine_error").passed
    assert not report().passed


def test_percentile_is_the_nearest_rank():
    values = [0.4, 0.1, 0.3, 0.2]
    assert [percentile(values, p) for p in (0, 25, 50, 95, 100)] == [0.1, 0.1, 0.2, 0.4, 0.4]
