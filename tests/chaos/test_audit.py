"""The audit finds each kind of fault: each test breaks one thing in the data of a clean run."""

import msgpack
import pytest

from ingine.contract.events import TerminalEvent, TokensEvent
from ingine.contract.record import JobStatus
from tests.chaos.audit import KINDS, Findings, audit
from tests.chaos.jobs import JobSpec
from tests.chaos.outputs import Answer, Output
from tests.chaos.requests import Request
from tests.chaos.seen import Seen
from tests.chaos.snapshot import Log, Snapshot

TOKEN_IDS, TEXT = [7, 8, 9], "abc!"
SPECS = [
    JobSpec(0, Request({}), request=0, reply_to="audit", not_before_s=1.0, deadline_s=5.0),
    JobSpec(1, Request({}), request=None, poison=True),
    JobSpec(2, Request({"n": 2}), request=1),
    JobSpec(3, Request({}, {"messages": []}), request=2),
]
ACCEPTED = [(0, "good"), (1, "bad"), (2, "pair"), (3, "chat")]
ANSWERS = [
    Answer([Output(TOKEN_IDS, TEXT, "stop")]),
    Answer([Output([1, 2], "xy", "length"), Output([1], "z", "stop", "Z")]),
    Answer([Output([5], "<think>hm</think>yes", "stop", marked_text="<think>hm</think>yes")]),
]
DELTA, MESSAGE = {"reasoning": "hm"}, {"role": "assistant", "content": "yes", "reasoning": "hm"}


def log_of(job_id: str, number: int, token_ids: list[int], **ending) -> Log:
    log = Log(status=str(ending["status"]), position=len(token_ids))
    for position, token_id in enumerate(token_ids, 1):
        log.entries.append((f"{position}-0", TokensEvent(position, [token_id], TEXT[position - 1])))
    end = TerminalEvent(position=len(token_ids), job_id=job_id, metadata={"number": number}, **ending)
    log.entries.append((f"{len(token_ids)}-1", end))
    return log


def pair_log() -> Log:
    """The log of a job of two choices. The end of the second choice is in the terminal event."""
    events = [
        TokensEvent(1, [1], "x", index=0, choice_position=1),
        TokensEvent(2, [1], "", index=1, choice_position=1),
        TokensEvent(3, [2], "y", index=0, choice_position=2, finish_reason="length"),
    ]
    choices = [
        {"index": 0, "finish_reason": "length", "num_output_tokens": 2},
        {"index": 1, "finish_reason": "stop", "num_output_tokens": 1, "stop_reason": "Z", "text": "z"},
    ]
    end = TerminalEvent(3, JobStatus.FINISHED, "pair", metadata={"number": 2}, choices=choices)
    entries = [(f"{event.position}-0", event) for event in events]
    return Log(status="finished", position=3, entries=[*entries, ("3-1", end)])


def chat_log() -> Log:
    """The log of a chat whose output is reasoning and content."""
    tokens = TokensEvent(1, [5], "<think>hm</think>", delta=DELTA)
    end = TerminalEvent(1, JobStatus.FINISHED, "chat", "yes", "stop", metadata={"number": 3}, message=MESSAGE)
    end.delta = {"content": "yes"}
    return Log(status="finished", position=1, entries=[("1-0", tokens), ("1-1", end)])


class World:
    """A clean run of four jobs, to be broken."""

    def __init__(self):
        error = {"code": "worker_lost", "message": "it died"}
        good = log_of("good", 0, TOKEN_IDS, status=JobStatus.FINISHED, text="!", finish_reason="stop")
        bad = log_of("bad", 1, [], status=JobStatus.FAILED, error=error)
        letter = {"job": msgpack.packb({"id": "bad"}), "code": b"worker_lost", "reason": b"it died"}
        logs = {"good": good, "bad": bad, "pair": pair_log(), "chat": chat_log()}
        self.snapshot = Snapshot(logs, replies=[good.entries[-1][1]], dead=[letter])
        good.waited_s = 1.0
        self.accepted, self.cancelled, self.answers = list(ACCEPTED), set(), list(ANSWERS)
        self.seen_records = {
            "good": [
                {"attached": 0},
                {"position": 1, "ids": [7], "text": "a"},
                {"attached": 1},
                {"position": 3, "ids": [8, 9], "text": "bc"},
                {"position": 3, "ids": [], "text": "!"},
                {"end": "finished"},
            ],
            "bad": [{"attached": 0}, {"end": "failed"}],
            "pair": [
                {"attached": 0},
                {"position": 1, "ids": [1], "text": "x", "index": 0, "choice_position": 1},
                {"position": 2, "ids": [1], "text": "", "index": 1, "choice_position": 1},
                {"position": 3, "ids": [2], "text": "y", "index": 0, "choice_position": 2,
                 "finish_reason": "length"},
                {"position": 3, "ids": [], "text": "z", "index": 1, "choice_position": 1},
                {"result": [[[1, 2], "xy", "length", None, None], [[1], "z", "stop", "Z", None]]},
                {"end": "finished"},
            ],
            "chat": [
                {"position": 1, "ids": [5], "text": "<think>hm</think>", "delta": DELTA},
                {"position": 1, "ids": [], "text": "yes", "delta": {"content": "yes"}},
                {"position": 1, "ids": [], "text": "yes", "delta": {"content": "yes"}},
                {"result": [[[5], "<think>hm</think>yes", "stop", None, MESSAGE]]},
                {"end": "finished"},
            ],
        }  # fmt: skip

    @property
    def good(self) -> Log:
        return self.snapshot.logs["good"]

    @property
    def chat(self) -> Log:
        return self.snapshot.logs["chat"]

    @property
    def pair(self) -> Log:
        return self.snapshot.logs["pair"]

    def audit(self) -> Findings:
        seen: dict[str, Seen] = {}
        for job_id, records in self.seen_records.items():
            for record in records:
                seen.setdefault(job_id, Seen()).take(record)
        return audit(
            self.accepted,
            SPECS.__getitem__,
            self.snapshot,
            seen,
            self.answers,
            cancelled=self.cancelled,
        )


@pytest.fixture
def world() -> World:
    return World()


def test_a_clean_run_is_clean(world):
    findings = world.audit()
    assert findings.violations == []
    assert findings.endings == {"finished": 3, "failed": 1}
    assert (findings.num_tokens, findings.num_choices, findings.num_resumes) == (7, 4, 1)


def test_a_job_may_fail_as_it_does_without_faults(world):
    world.snapshot.logs["good"] = log_of(
        "good",
        0,
        TOKEN_IDS,
        status=JobStatus.FAILED,
        text="!",
        finish_reason="stop",
        error={"code": "grammar_failed"},
    )
    world.snapshot.replies[0] = world.good.entries[-1][1]
    world.seen_records["good"][-1] = {"end": "failed"}
    assert world.audit().counts["unfair"] == 1
    world.answers[0] = Answer(ANSWERS[0].outputs, "grammar_failed")
    world.good.waited_s = 1.0
    assert world.audit().violations == []


def lose_the_job(world):
    del world.snapshot.logs["good"]


def lose_the_end(world):
    del world.good.entries[-1]


def lose_a_token(world):
    del world.good.entries[1]


def lose_the_last_token_and_its_count(world):
    del world.good.entries[2]


def lose_the_reply(world):
    world.snapshot.replies.clear()


def lose_the_dead_letter(world):
    world.snapshot.dead.clear()


def repeat_a_token(world):
    world.good.entries.insert(1, world.good.entries[0])


def repeat_the_end(world):
    world.good.entries.append(world.good.entries[-1])


def repeat_the_reply(world):
    world.snapshot.replies *= 2


def accept_it_twice(world):
    world.accepted.append((0, "another"))


def run_it_twice(world):
    world.snapshot.logs["twin"] = log_of("twin", 0, [], status=JobStatus.CANCELLED)


def leave_what_nobody_acknowledged(world):
    world.snapshot.logs["unheard"] = Log(status="queued", position=0)


def say_another_token(world):
    world.good.entries[1][1].token_ids[0] = 99
    world.seen_records["good"][3]["ids"] = [99, 9]


def say_another_text(world):
    world.good.entries[1][1].text = "X"
    world.seen_records["good"][3]["text"] = "Xc"


def end_too_early(world):
    world.snapshot.logs["good"] = log_of("good", 0, TOKEN_IDS[:2], status=JobStatus.FINISHED, text="!")


def give_it_anothers_metadata(world):
    world.good.entries[-1][1].metadata = {"number": 1}


def fail_an_innocent(world):
    world.snapshot.logs["good"] = log_of(
        "good", 0, [7], status=JobStatus.FAILED, error={"code": "worker_lost", "message": ""}
    )


def let_the_poison_finish(world):
    world.snapshot.logs["bad"] = log_of("bad", 1, [], status=JobStatus.FINISHED)


def cancel_what_nobody_cancelled(world):
    world.snapshot.logs["good"] = log_of("good", 0, TOKEN_IDS, status=JobStatus.CANCELLED)


def finish_in_spite_of_a_cancel(world):
    world.cancelled = {0}


def begin_too_early(world):
    world.good.waited_s = 0.5


def expire_too_early(world):
    world.snapshot.logs["good"] = log_of("good", 0, TOKEN_IDS, status=JobStatus.EXPIRED)
    world.good.lived_s = 4.0


def bury_an_innocent(world):
    world.snapshot.dead.append({"job": msgpack.packb({"id": "good"}), "code": b"duplicate_id"})


def show_a_consumer_a_token_twice(world):
    world.seen_records["good"].insert(2, world.seen_records["good"][1])


def show_a_consumer_a_gap(world):
    world.seen_records["good"][3] = {"position": 3, "ids": [9], "text": "c"}


def show_a_consumer_another_text(world):
    world.seen_records["good"][3]["text"] = "xx"


def never_tell_a_consumer_the_end(world):
    world.seen_records["good"].pop()


def forget_a_consumer(world):
    del world.seen_records["good"]


def lose_a_choice(world):
    del world.pair.entries[-1][1].choices[1]


def lose_all_choices(world):
    world.pair.entries[-1][1].choices = None


def lose_a_token_of_a_choice(world):
    world.pair.entries[2][1].choice_position = 3


def repeat_a_token_of_a_choice(world):
    world.pair.entries[2][1].choice_position = 1


def count_a_choice_wrong(world):
    world.pair.entries[-1][1].choices[1]["num_output_tokens"] = 2


def continue_a_choice_after_its_end(world):
    world.pair.entries[0][1].finish_reason = "length"


def swap_choices(world):
    world.pair.entries[1][1].index, world.pair.entries[2][1].index = 0, 1


def end_a_choice_otherwise(world):
    world.pair.entries[-1][1].choices[1]["finish_reason"] = "length"


def forget_what_stopped_a_choice(world):
    del world.pair.entries[-1][1].choices[1]["stop_reason"]


def add_a_choice(world):
    world.pair.entries[1][1].index = 2


def name_no_choice(world):
    world.pair.entries[0][1].choice_position = None


def report_prompt_logprobs_that_nobody_wanted(world):
    world.pair.entries[0][1].prompt_logprobs = [None]


def count_usage_wrong(world):
    world.pair.entries[-1][1].usage = {"num_output_tokens": 2}


def show_a_consumer_another_choice(world):
    world.seen_records["pair"][2]["index"] = 0


def show_a_consumer_a_choice_twice(world):
    world.seen_records["pair"].insert(3, world.seen_records["pair"][2])


def show_a_consumer_another_end_of_a_choice(world):
    world.seen_records["pair"][3]["finish_reason"] = "stop"


def give_a_consumer_another_result(world):
    world.seen_records["pair"][5]["result"][1][1] = "zz"


def lose_a_delta(world):
    world.chat.entries[-1][1].delta = None


def repeat_a_delta(world):
    world.chat.entries[-1][1].delta = {"reasoning": "hm", "content": "yes"}


def end_with_another_message(world):
    world.chat.entries[-1][1].message = MESSAGE | {"content": "no"}


def end_without_a_message(world):
    world.chat.entries[-1][1].message = None


def give_a_message_to_a_prompt(world):
    world.pair.entries[-1][1].choices[0]["message"] = MESSAGE


def show_a_consumer_another_delta(world):
    world.seen_records["chat"][0]["delta"] = {"content": "hm"}


def give_a_consumer_another_message(world):
    world.seen_records["chat"][3]["result"][0][4] = None


def leave_a_key(world):
    world.snapshot.orphans.append("ingine:{q}:job:x has no TTL")


@pytest.mark.parametrize(
    ("breaks", "kind"),
    [
        (lose_the_job, "lost"),
        (lose_the_end, "lost"),
        (lose_the_reply, "lost"),
        (lose_the_dead_letter, "lost"),
        (leave_what_nobody_acknowledged, "lost"),
        (lose_a_token, "gaps"),
        (lose_the_last_token_and_its_count, "gaps"),
        (repeat_a_token, "repeated"),
        (repeat_the_end, "repeated"),
        (repeat_the_reply, "repeated"),
        (accept_it_twice, "repeated"),
        (run_it_twice, "repeated"),
        (say_another_token, "wrong"),
        (say_another_text, "wrong"),
        (end_too_early, "wrong"),
        (give_it_anothers_metadata, "wrong"),
        (fail_an_innocent, "unfair"),
        (let_the_poison_finish, "unfair"),
        (cancel_what_nobody_cancelled, "unfair"),
        (finish_in_spite_of_a_cancel, "unfair"),
        (begin_too_early, "unfair"),
        (expire_too_early, "unfair"),
        (bury_an_innocent, "unfair"),
        (show_a_consumer_a_token_twice, "repeated"),
        (show_a_consumer_a_gap, "gaps"),
        (show_a_consumer_another_text, "mismatched"),
        (never_tell_a_consumer_the_end, "mismatched"),
        (forget_a_consumer, "mismatched"),
        (lose_a_choice, "lost"),
        (lose_all_choices, "lost"),
        (lose_a_token_of_a_choice, "gaps"),
        (count_a_choice_wrong, "gaps"),
        (repeat_a_token_of_a_choice, "repeated"),
        (continue_a_choice_after_its_end, "repeated"),
        (swap_choices, "wrong"),
        (end_a_choice_otherwise, "wrong"),
        (forget_what_stopped_a_choice, "wrong"),
        (add_a_choice, "wrong"),
        (name_no_choice, "wrong"),
        (report_prompt_logprobs_that_nobody_wanted, "wrong"),
        (count_usage_wrong, "wrong"),
        (show_a_consumer_another_choice, "mismatched"),
        (show_a_consumer_a_choice_twice, "repeated"),
        (show_a_consumer_another_end_of_a_choice, "mismatched"),
        (give_a_consumer_another_result, "mismatched"),
        (lose_a_delta, "wrong"),
        (repeat_a_delta, "wrong"),
        (end_with_another_message, "wrong"),
        (end_without_a_message, "wrong"),
        (give_a_message_to_a_prompt, "wrong"),
        (show_a_consumer_another_delta, "mismatched"),
        (give_a_consumer_another_message, "mismatched"),
        (leave_a_key, "orphans"),
    ],
    ids=lambda value: value.__name__ if callable(value) else value,
)
def test_the_audit_catches(world, breaks, kind):
    breaks(world)
    findings = world.audit()
    assert findings.counts[kind] > 0, findings.violations
    assert set(findings.counts) == set(KINDS)
