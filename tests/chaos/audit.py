"""Checks the promises on the data that a run has left. It has no I/O: all input is plain values.

Each violation is counted under one of `KINDS` and described in a sentence.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, field

import msgpack

from ingine.contract.events import TerminalEvent
from ingine.contract.record import JobStatus
from tests.chaos.jobs import JobSpec
from tests.chaos.messages import faults_of_messages
from tests.chaos.outputs import Answer, Output, faults_of_choices, faults_of_outputs, outputs_of
from tests.chaos.seen import Seen, faults_of_seen
from tests.chaos.snapshot import Log, Snapshot

KINDS = {
    "lost": "acknowledged jobs or choices without an end, replies or dead letters that are not there",
    "repeated": "positions of jobs or choices, ends, replies or jobs that are there twice",
    "gaps": "positions of jobs or choices that are missing in a log or in what a consumer saw",
    "mismatched": "consumers that saw something else than the log has",
    "wrong": "choices that differ from an uninterrupted run's",
    "unfair": "jobs that began or ended as nobody asked for",
    "orphans": "keys without a TTL, entries and pending entries that nobody will ever touch",
}

MS = 0.001


@dataclass
class Findings:
    counts: Counter = field(default_factory=lambda: Counter(dict.fromkeys(KINDS, 0)))
    violations: list[str] = field(default_factory=list)
    endings: Counter = field(default_factory=Counter)
    num_tokens: int = 0
    num_choices: int = 0
    """Choices of the jobs that have ended."""
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
    answers: list[Answer],
    *,
    cancelled: Container[int] = (),
) -> Findings:
    """Check all promises.

    accepted: (job number, job id) of each answer to a submission; a job may occur twice. answers: those of
    the uninterrupted run, one for each request. cancelled: jobs for which `cancel` returned so.
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
        answer = None if spec.request is None else answers[spec.request]
        _check_ending(findings, spec, log, end, cancelled, answer and answer.error)
        outputs = outputs_of(log)
        if answer is not None:
            _check_outputs(findings, spec, log, end, outputs, answer)
        of_job = seen.get(job_id, Seen())
        findings.num_resumes += max(0, of_job.num_attached - 1)
        for kind, sentence in faults_of_seen(of_job, outputs, end):
            findings.add(kind, f"job {number} ({job_id}): {sentence}")
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
    findings: Findings,
    spec: JobSpec,
    log: Log,
    end: TerminalEvent,
    cancelled: Container[int],
    error: str | None,
) -> None:
    """error: the code of the error in which the job ends without any fault."""
    findings.endings[str(end.status)] += 1
    findings.num_deaths += log.deaths
    code = (end.error or {}).get("code")
    expected = {
        JobStatus.FINISHED: not spec.poison and error is None,
        JobStatus.FAILED: code == ("worker_lost" if spec.poison else error or "none"),
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


def _check_outputs(
    findings: Findings,
    spec: JobSpec,
    log: Log,
    end: TerminalEvent,
    outputs: dict[int, Output],
    answer: Answer,
) -> None:
    """Check each choice: it is whole if the job has ended by itself, else a beginning."""
    name = f"job {spec.number} ({end.job_id}, {end.status})"
    num_choices = len(answer.outputs)
    findings.num_choices += num_choices
    for kind, sentence in faults_of_choices(log, num_choices):
        findings.add(kind, f"{name}: {sentence}")
    is_whole = end.status in (JobStatus.FINISHED, JobStatus.FAILED)
    for index, sentence in faults_of_outputs(outputs, answer, is_whole=is_whole):
        findings.add("wrong", f"{name}, choice {index}: {sentence}")
    if end.status is JobStatus.FINISHED:
        for index, sentence in faults_of_messages(outputs, answer, spec.asks, end.job_id):
            findings.add("wrong", f"{name}, choice {index}: {sentence}")
    num_tokens = sum(len(output.token_ids) for output in outputs.values())
    if end.usage.get("num_output_tokens", num_tokens) != num_tokens:
        findings.add("wrong", f"{name} has {num_tokens} tokens, and its usage says {end.usage}")


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
