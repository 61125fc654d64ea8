"""Checks the promises on the data that a run has left. It has no I/O: all input is plain values.

Each violation is counted under one of `KINDS` and described in a sentence.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, field
from typing import Any

import msgpack

from ingine.contract.events import TerminalEvent
from ingine.contract.record import JobStatus
from tests.chaos.jobs import JobSpec
from tests.chaos.snapshot import Log, Snapshot

KINDS = {
    "lost": "acknowledged jobs without a terminal event, replies or dead letters that are not there",
    "repeated": "positions, terminal events, replies or jobs that are there twice",
    "gaps": "positions that are missing in a log or in what a consumer saw",
    "mismatched": "consumers that saw something else than the log has",
    "wrong": "outputs that differ from an uninterrupted run's",
    "unfair": "jobs that began or ended as nobody asked for",
    "orphans": "keys without a TTL, entries and pending entries that nobody will ever touch",
}

MS = 0.001


@dataclass
class Seen:
    """The records of one job by its consumers, in order."""

    token_ids: dict[int, int] = field(default_factory=dict)
    """Token ids by position, starting at 1."""
    text: str = ""
    last_text: str = ""
    end: str | None = None
    num_attached: int = 0
    faults: list[str] = field(default_factory=list)

    def take(self, record: dict[str, Any]) -> None:
        if "attached" in record:
            self.num_attached += 1
            if record["attached"] != len(self.token_ids):
                self.faults.append(f"came back at {record['attached']} after {len(self.token_ids)}")
        elif "ids" in record:
            self._take_chunk(record["position"], record["ids"], record["text"])
        elif "end" in record:
            self.end = record["end"]

    def _take_chunk(self, position: int, token_ids: list[int], text: str) -> None:
        if not token_ids:
            # The end of the text, repeated for a consumer that was killed before it recorded the end.
            self.last_text = text
            return
        start = position - len(token_ids) + 1
        for at, token_id in enumerate(token_ids, start):
            if at in self.token_ids:
                self.faults.append(f"repeat at {at}")
            elif at != len(self.token_ids) + 1:
                self.faults.append(f"gap before {at}")
            self.token_ids[at] = token_id
        self.text += text


@dataclass
class Findings:
    counts: Counter = field(default_factory=lambda: Counter(dict.fromkeys(KINDS, 0)))
    violations: list[str] = field(default_factory=list)
    endings: Counter = field(default_factory=Counter)
    num_tokens: int = 0
    num_resumes: int = 0
    """Number of streams that a consumer resumed."""
    num_deaths: int = 0

    def add(self, kind: str, sentence: str) -> None:
        self.counts[kind] += 1
        self.violations.append(f"{kind}: {sentence}")


def audit(
    accepted: Iterable[tuple[int, str]],
    spec_of: Callable[[int], JobSpec],
    snapshot: Snapshot,
    seen: dict[str, Seen],
    answers: list[tuple[list[int], str]],
    *,
    cancelled: Container[int] = (),
) -> Findings:
    """Check all promises.

    accepted: (job number, job id) of each answer to a submission; a job may occur twice. answers: those of
    the uninterrupted run, one for each greedy request. cancelled: jobs for which `cancel` returned so.
    """
    findings = Findings()
    ids: dict[int, str] = {}
    for number, job_id in accepted:
        if ids.setdefault(number, job_id) != job_id:
            findings.add("repeated", f"job {number} was accepted as {ids[number]} and as {job_id}")
    number_of = {job_id: number for number, job_id in ids.items()}

    for number, job_id in ids.items():
        log = snapshot.logs.get(job_id)
        if log is None:
            findings.add("lost", f"job {number} ({job_id}) was accepted and is unknown")
            continue
        end = _check_log(findings, job_id, log)
        if end is None:
            findings.add("lost", f"job {number} ({job_id}) has no terminal event, its status is {log.status}")
            continue
        spec = spec_of(number)
        _check_ending(findings, spec, log, end, cancelled)
        if spec.greedy is not None:
            _check_output(findings, number, log, end, answers[spec.greedy])
        _check_seen(findings, number, log, end, seen.get(job_id, Seen()))
    for job_id in snapshot.logs.keys() - number_of.keys():
        _check_unacknowledged(findings, job_id, snapshot.logs[job_id], ids)
    _check_replies(findings, ids, spec_of, snapshot)
    _check_dead(findings, ids, spec_of, snapshot)
    for orphan in snapshot.orphans:
        findings.add("orphans", orphan)
    return findings


def _check_log(findings: Findings, job_id: str, log: Log) -> TerminalEvent | None:
    """Check that positions are 1..N, each once, and that the last entry is the only terminal event.

    Returns it.
    """
    position, ends = 0, []
    for entry, event in log.entries:
        if isinstance(event, TerminalEvent):
            ends.append(event)
            if entry != f"{position}-1" or event.position != position:
                findings.add("gaps", f"{job_id} ends at {entry}, {event.position}, its tokens at {position}")
            continue
        start = event.position - len(event.token_ids)
        if start != position or entry != f"{event.position}-0":
            kind = "repeated" if start < position else "gaps"
            findings.add(kind, f"{job_id}: entry {entry} has positions after {start}, expected {position}")
        if ends:
            findings.add("repeated", f"{job_id}: tokens behind the terminal event")
        position = event.position
        findings.num_tokens += len(event.token_ids)
    if len(ends) > 1:
        findings.add("repeated", f"{job_id} has {len(ends)} terminal events")
    if log.position is not None and log.position != position:
        findings.add("gaps", f"{job_id}: its record says {log.position}, its log {position}")
    return ends[-1] if ends else None


def _check_ending(
    findings: Findings, spec: JobSpec, log: Log, end: TerminalEvent, cancelled: Container[int]
) -> None:
    findings.endings[str(end.status)] += 1
    findings.num_deaths += log.deaths
    code = (end.error or {}).get("code")
    expected = {
        JobStatus.FINISHED: not spec.poison,
        JobStatus.FAILED: spec.poison and code == "worker_lost",
        JobStatus.CANCELLED: spec.cancel_after_s is not None,
        JobStatus.EXPIRED: spec.deadline_s is not None,
    }
    if not expected[end.status]:
        findings.add("unfair", f"job {spec.number} ended as {end.status} ({code}) after {log.deaths} deaths")
    if spec.number in cancelled and end.status is not JobStatus.CANCELLED:
        findings.add("unfair", f"job {spec.number} was said to be cancelled and ended as {end.status}")
    if spec.not_before_s and log.waited_s is not None and log.waited_s < spec.not_before_s - MS:
        findings.add("unfair", f"job {spec.number} began after {log.waited_s} s, not {spec.not_before_s}")
    if end.status is JobStatus.EXPIRED and spec.deadline_s and log.lived_s < spec.deadline_s - 3 * MS:
        findings.add("unfair", f"job {spec.number} expired after {log.lived_s} s, not {spec.deadline_s}")
    if log.status != end.status:
        findings.add("mismatched", f"job {spec.number}: its record says {log.status}, its log {end.status}")
    if (end.metadata or {}).get("number") != spec.number:
        findings.add("wrong", f"job {spec.number} has another's metadata: {end.metadata}")


def _output(log: Log) -> tuple[list[int], str]:
    token_ids, text = [], ""
    for _, event in log.entries:
        token_ids += getattr(event, "token_ids", [])
        text += event.text
    return token_ids, text


def _check_output(findings: Findings, number: int, log: Log, end, answer: tuple[list[int], str]) -> None:
    """Check that the output is whole if the job finished, else a prefix of it."""
    token_ids, text = _output(log)
    right_ids, right_text = answer
    if end.status is JobStatus.FINISHED:
        right = (token_ids, text) == (right_ids, right_text)
    else:
        # The text of a prefix may end in half a character, and so differ from the whole there.
        right = token_ids == right_ids[: len(token_ids)] and right_text.startswith(text.rstrip("\ufffd"))
    if not right:
        findings.add("wrong", f"job {number} ({end.job_id}, {end.status}): {token_ids} for {right_ids}")


def _check_seen(findings: Findings, number: int, log: Log, end: TerminalEvent, seen: Seen) -> None:
    findings.num_resumes += max(0, seen.num_attached - 1)
    for fault in seen.faults:
        kind = "repeated" if fault.startswith("repeat") else "gaps"
        findings.add(kind, f"job {number} ({end.job_id}): its consumer saw a {fault}")
    token_ids, text = _output(log)
    if list(seen.token_ids.values()) != token_ids or seen.text + seen.last_text != text:
        findings.add("mismatched", f"job {number} ({end.job_id}): its consumer saw {seen}, not the log")
    if seen.end != end.status:
        findings.add("mismatched", f"job {number} ({end.job_id}): its consumer saw end {seen.end}")


def _check_unacknowledged(findings: Findings, job_id: str, log: Log, ids: dict[int, str]) -> None:
    """Check jobs whose producer died before it recorded the answer: they were accepted all the same."""
    end = _check_log(findings, job_id, log)
    if end is None:
        findings.add("lost", f"{job_id}, whose answer was lost, has no terminal event ({log.status})")
    elif (number := (end.metadata or {}).get("number")) in ids:
        findings.add("repeated", f"job {number} ran as {ids[number]} and as {job_id}")


def _check_replies(findings: Findings, ids: dict[int, str], spec_of, snapshot: Snapshot) -> None:
    replies = Counter(event.job_id for event in snapshot.replies)
    for number, job_id in ids.items():
        wanted = int(spec_of(number).reply_to is not None)
        if replies[job_id] != wanted:
            kind = "lost" if replies[job_id] < wanted else "repeated"
            findings.add(kind, f"job {number} ({job_id}) has {replies[job_id]} replies, not {wanted}")


def _check_dead(findings: Findings, ids: dict[int, str], spec_of, snapshot: Snapshot) -> None:
    """Check that the dead letters have each poison job once, with its bytes, and nothing else."""
    letters: dict[str, list[str]] = defaultdict(list)
    for letter in snapshot.dead:
        letters[msgpack.unpackb(letter["job"])["id"]].append(letter["code"].decode())
    for number, job_id in ids.items():
        found, wanted = letters[job_id], ["worker_lost"] if spec_of(number).poison else []
        if found != wanted:
            kind = "lost" if not found else "unfair"
            findings.add(kind, f"job {number} ({job_id}) has dead letters {found}, not {wanted}")
