"""The audit finds each kind of fault: each test breaks one thing in the data of a clean run."""

import msgpack
import pytest

from ingine.contract.events import TerminalEvent, TokensEvent
from ingine.contract.record import JobStatus
from tests.chaos.audit import KINDS, Findings, Seen, audit
from tests.chaos.jobs import JobSpec
from tests.chaos.snapshot import Log, Snapshot

TOKEN_IDS, TEXT = [7, 8, 9], "abc!"
SPECS = [
    JobSpec(0, "hello", {}, greedy=0, reply_to="audit", not_before_s=1.0, deadline_s=5.0),
    JobSpec(1, "POISON", {}, greedy=None, poison=True),
]
ACCEPTED = [(0, "good"), (1, "bad")]


def log_of(job_id: str, number: int, token_ids: list[int], **ending) -> Log:
    log = Log(status=str(ending["status"]), position=len(token_ids))
    for position, token_id in enumerate(token_ids, 1):
        log.entries.append((f"{position}-0", TokensEvent(position, [token_id], TEXT[position - 1])))
    end = TerminalEvent(position=len(token_ids), job_id=job_id, metadata={"number": number}, **ending)
    log.entries.append((f"{len(token_ids)}-1", end))
    return log


class World:
    """A clean run of two jobs, to be broken."""

    def __init__(self):
        error = {"code": "worker_lost", "message": "it died"}
        good = log_of("good", 0, TOKEN_IDS, status=JobStatus.FINISHED, text="!")
        bad = log_of("bad", 1, [], status=JobStatus.FAILED, error=error)
        letter = {"job": msgpack.packb({"id": "bad"}), "code": b"worker_lost", "reason": b"it died"}
        self.snapshot = Snapshot({"good": good, "bad": bad}, replies=[good.entries[-1][1]], dead=[letter])
        good.waited_s = 1.0
        self.accepted, self.cancelled = list(ACCEPTED), set()
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
        }

    @property
    def good(self) -> Log:
        return self.snapshot.logs["good"]

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
            [(TOKEN_IDS, TEXT)],
            cancelled=self.cancelled,
        )


@pytest.fixture
def world() -> World:
    return World()


def test_a_clean_run_is_clean(world):
    findings = world.audit()
    assert findings.violations == []
    assert findings.endings == {"finished": 1, "failed": 1}
    assert (findings.num_tokens, findings.num_resumes) == (3, 1)


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
        (leave_a_key, "orphans"),
    ],
    ids=lambda value: value.__name__ if callable(value) else value,
)
def test_the_audit_catches(world, breaks, kind):
    breaks(world)
    findings = world.audit()
    assert findings.counts[kind] > 0, findings.violations
    assert set(findings.counts) == set(KINDS)
