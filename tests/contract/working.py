"""The rules of workers: living ones, and those that were considered dead and return with old attempts."""

import contextlib

from hypothesis import strategies as st
from hypothesis.stateful import Bundle, multiple, precondition, rule

from ingine.contract.calls.running import Append
from ingine.contract.entries import Entry as QueueEntry
from ingine.contract.events import decode_event
from ingine.contract.jobs import decode_job
from ingine.contract.keys import Priority
from ingine.contract.record import JobStatus
from ingine.errors import ErrorCode, InvalidJob
from ingine.worker.job_streams import LOW_FIRST_EVERY
from tests.contract.calls import Attempt, Delivered
from tests.contract.producing import WORKERS, Machine

FAR_MS = 2**45
"""A due time beyond the end of any test."""

workers = st.sampled_from(WORKERS)
places = st.integers(1, 6)
offsets = st.sampled_from([0, 0, 0, 0, -1, 1])
"""Distance of a worker's position from the log's end, which is 0 most often."""
endings = st.sampled_from([JobStatus.FINISHED, JobStatus.FAILED, JobStatus.CANCELLED, JobStatus.EXPIRED])


class Working(Machine):
    delivered = Bundle("delivered")
    """Every entry that was ever delivered to a worker."""
    attempts = Bundle("attempts")
    """Every attempt that was ever begun: most have ended, and their writes must be refused."""

    # ------------------------------------------------------------------------------------- intake

    @precondition(lambda self: self.model.num_jobs)
    @rule(target=delivered, worker=workers, num_places=places)
    def take(self, worker, num_places):
        return multiple(*self._take(worker, num_places))

    def _take(self, worker: str, num_places: int) -> list[Delivered]:
        entries = self.calls.run(self.calls.queue(worker).take(num_places))
        self.num_reads[worker] += 1
        order = list(Priority)
        if self.num_reads[worker] % LOW_FIRST_EVERY == 0:
            order.reverse()
        taken: list[str] = []
        for priority in order:
            if num_places > 0:
                stream = self.model.streams[priority]
                of_stream = stream.take(worker, num_places, self.model.weights)
                num_places -= stream.num_choices(of_stream)
                taken += of_stream
        if self.real:
            assert [entry.id for entry in entries] == taken
        assert {entry.id for entry in entries} == set(taken)
        return self._deliver(worker, entries)

    @precondition(lambda self: any(stream.held_by(None) for stream in self.model.streams.values()))
    @rule(target=delivered, worker=workers)
    def wait_for_new(self, worker):
        entries = self.calls.run(self.calls.queue(worker).wait_for_new(0.01))
        taken = [entry_id for stream in self.model.streams.values() for entry_id in stream.take_new(worker)]
        assert [entry.id for entry in entries] == taken
        return multiple(*self._deliver(worker, entries))

    @precondition(lambda self: any(stream.claimable() for stream in self.model.streams.values()))
    @rule(target=delivered, worker=workers, num_places=places)
    def claim(self, worker, num_places):
        return multiple(*self._claim(worker, num_places))

    def _claim(self, worker: str, num_places: int) -> list[Delivered]:
        """Claim entries, urgent ones first; within a stream no order is promised."""
        entries = self.calls.run(self.calls.queue(worker).claim_idle(3600, num_places))
        for priority, stream in self.model.streams.items():
            claimable = stream.claimable()
            claimed = [entry.id for entry in entries if entry.priority is priority]
            assert set(claimed) <= set(claimable) and len(set(claimed)) == len(claimed)
            if claimed:
                assert stream.num_choices(claimed[:-1]) < num_places, "the last found a free place"
            num_places -= stream.num_choices(claimed)
            assert num_places <= 0 or len(claimed) == len(claimable), "no place is free, or nothing is left"
            for entry_id in claimed:
                stream.give(entry_id, worker)
        return self._deliver(worker, entries)

    @rule(target=delivered, worker=workers)
    def read_own_pending(self, worker):
        """Read a worker's own pending entries, as after a lost connection, which may have lost a reply."""
        queue = self.calls.queue(worker)
        entries, after = self.calls.run(queue.own_pending())
        while after:
            page, after = self.calls.run(queue.own_pending(after))
            entries += page
        held = [entry for stream in self.model.streams.values() for entry in stream.held_by(worker)]
        # Each page has entries of all priorities.
        by_priority = sorted(entries, key=lambda entry: list(Priority).index(entry.priority))
        assert [entry.id for entry in by_priority] == [entry.id for entry in held]
        for entry in held:
            entry.silent = entry.silent and not self.real
        return multiple(*self._deliver(worker, entries))

    def _deliver(self, worker: str, entries: list[QueueEntry]) -> list[Delivered]:
        deliveries = []
        for entry in entries:
            job = None
            with contextlib.suppress(InvalidJob):
                job = decode_job(entry.raw)
            deliveries.append(Delivered(worker, entry, job and job.id, job and job.reply_to))
        return deliveries

    # --------------------------------------------------------------------------------------- jobs

    @rule(target=attempts, delivered=delivered, alone=st.booleans())
    def begin(self, delivered, alone):
        return self._begin(delivered, alone) or multiple()

    def _begin(self, delivered: Delivered, alone: bool) -> Attempt | None:
        """Begin a job. Returns None if it does not run."""
        entry, job_id, place = delivered.entry, delivered.job_id, delivered.place
        if job_id is None:  # a worker buries it
            return None
        queue = self.calls.queue(delivered.worker)
        begun = self.calls.run(queue.begin(entry, job_id, delivered.reply_to, alone=alone))
        answer = (begun.verdict, begun.attempt, begun.position, begun.deaths, begun.cancelled)
        predicted = self.model.begin(*place, job_id, delivered.reply_to or "", alone)
        assert answer[: len(predicted)] == predicted
        if begun.verdict != "run":
            return None
        record = self.model.records[job_id]
        record.submitted_at = record.submitted_at or begun.submitted_at
        assert record.submitted_at == begun.submitted_at <= begun.now
        assert begun.idempotency_key == record.key
        return Attempt(delivered, begun.attempt, begun.idempotency_key)

    @rule(delivered=delivered)
    def bury(self, delivered):
        """Bury an entry that can never run. An entry that the worker no longer has is left alone."""
        place, code = delivered.place, ErrorCode.DUPLICATE_ID
        if self.model.holds(*place):
            code = self.model.fault(*place[1:])
        if code:
            queue = self.calls.queue(delivered.worker)
            buried = self.calls.run(queue.bury(delivered.entry, str(code), "why"))
            assert buried == self.model.bury(*place, str(code))

    @rule(attempt=attempts, offset=offsets, num_tokens=st.integers(1, 3), twice=st.booleans())
    def append(self, attempt, offset, num_tokens, twice):
        tokens = self._tokens(attempt, offset, num_tokens)
        for _ in range(1 + twice):
            self._append([tokens])

    @rule(steps=st.lists(st.tuples(attempts, offsets, st.integers(1, 3)), min_size=2, max_size=4))
    def append_a_step_of_several(self, steps):
        """Append several steps in one call, in which each gets its own answer."""
        worker = steps[0][0].worker
        self._append([self._tokens(*step) for step in steps if step[0].worker == worker])

    def _tokens(self, attempt: Attempt, offset: int, num_tokens: int) -> Append:
        start = max(0, self._position(attempt) + offset)
        return attempt.tokens(start, start + num_tokens)

    def _append(self, appends: list[Append]) -> None:
        worker = decode_event(appends[0].raw).text
        predicted = [
            self.model.append(worker, append.job_id, append.attempt, append.start, append.position)
            for append in appends
        ]
        assert self.calls.run(self.calls.queue(worker).append(appends)) == predicted

    def _position(self, attempt: Attempt) -> int:
        record = self.model.records.get(attempt.job_id)
        return record.position if record else 0

    @rule(
        attempt=attempts, offset=offsets, status=endings, twice=st.booleans(),
        code=st.sampled_from([None, None, "worker_lost"]),
    )  # fmt: skip
    def finish(self, attempt, offset, status, twice, code):
        finish = attempt.end(max(0, self._position(attempt) + offset), status, code)
        for _ in range(1 + twice):
            ended = self.calls.run(self.calls.queue(attempt.worker).finish(finish))
            assert ended == self.model.finish(*attempt.place, finish)

    @rule(attempt=attempts)
    def release(self, attempt):
        released = self.calls.run(
            self.calls.queue(attempt.worker).release(attempt.entry, attempt.job_id, attempt.number)
        )
        assert released == self.model.release(*attempt.place, attempt.job_id, attempt.number)

    @rule(delivered=delivered)
    def release_unbegun(self, delivered):
        """Release an entry that is not begun, or was begun with a lost reply."""
        queue = self.calls.queue(delivered.worker)
        released = self.calls.run(queue.release_unbegun(delivered.entry, delivered.job_id))
        assert released == self.model.release(*delivered.place, delivered.job_id or "", 0)

    @rule(attempt=attempts, pause_s=st.sampled_from([None, None, 1e6]))
    def delay(self, attempt, pause_s):
        """Delay a job. pause_s: None if its step has failed, which counts as a death."""
        before_ms = self.calls.now_ms()
        delayed = self.calls.run(
            self.calls.queue(attempt.worker).delay(attempt.entry, attempt.job_id, attempt.number, pause_s)
        )
        assert delayed == self.model.delay(*attempt.place, attempt.job_id, attempt.number, pause_s is None)
        if delayed:
            record = self.model.records[attempt.job_id]
            pause_ms = (pause_s or (0 if record.cancel else 2 ** (record.deaths - 1))) * 1000
            assert before_ms + pause_ms <= self.calls.due_ms(attempt.job_id) <= self.calls.now_ms() + pause_ms
            self.calls.set_due(attempt.job_id, FAR_MS)  # otherwise the test would depend on speed

    @rule(attempt=attempts)
    def renew_one(self, attempt):
        self._renew([attempt])

    @rule(several=st.lists(attempts, min_size=2, max_size=3))
    def renew(self, several):
        self._renew([attempt for attempt in several if attempt.worker == several[0].worker])

    def _renew(self, held: list[Attempt]) -> None:
        predicted = [self.model.renew(*a.place, a.job_id, a.number) for a in held]
        assert self.calls.renew(held[0].worker, held) == predicted
