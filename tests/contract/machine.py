"""The whole state machine: producers, workers, time and accidents, in any order.

The model predicts the answer of each call. After each call the server's state equals the model's, and breaks
no promise.
"""

import copy
import sys

from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, multiple, precondition, rule

from ingine.contract.keys import RELEASED, WAITING, Priority
from ingine.contract.record import JobStatus
from tests.contract.calls import Attempt
from tests.contract.fair_order import LOST
from tests.contract.model import MAX_DEATHS
from tests.contract.producing import WORKERS, Producing, job_ids, priorities
from tests.contract.snapshot import broken_promises, differences, expected
from tests.contract.working import Working, workers

DEEDS = [
    ("append", 0, 1, False),
    ("finish", 0, JobStatus.FINISHED, False, None),
    ("release",),
    ("delay", None),
    ("renew_one",),
]
"""Possible next steps of a worker with a job: the rule, and its arguments."""

PLENTY = 10**6
"""Free places of a worker that takes everything."""


class Contract(Producing, Working):
    @initialize(target=Working.attempts, num_jobs=st.integers(1, 3), num_deaths=st.integers(0, 2))
    def begin_with_jobs_that_run(self, num_jobs, num_deaths):
        """Start with running jobs: otherwise most sequences would end before anything interesting happens."""
        for job_id in "abc"[:num_jobs]:
            self.submit(job_id, Priority.NORMAL, None, 1, None, None, False)
        attempts = [self._begin(delivered, alone=False) for delivered in self._take("w1", 4)]
        for attempt in attempts:
            self.append(attempt, 0, 1, twice=False)
        for dead, heir in [("w1", "w2"), ("w2", "w1")][:num_deaths]:
            attempts += self._die(dead, heir)
        return multiple(*attempts)

    @precondition(lambda self: self.model.delayed)
    @rule(number=st.integers(0, 2), due=st.booleans())
    def promote(self, number, due):
        """Promote delayed jobs, after the time of one has come, or before."""
        if due:
            self._make_due(self.model.delayed[number % len(self.model.delayed)])
        self._promote()

    def _make_due(self, job_id: str) -> None:
        self.calls.set_due(job_id, 1)
        self.model.due[job_id] = 1

    def _promote(self) -> None:
        self.calls.run(self.calls.queue("w1").promote())
        self.model.promote({job_id: self.calls.entry_of(job_id) for job_id in self.model.due})

    @precondition(lambda self: any(map(self._holds_any, [*WORKERS, WAITING])))
    @rule(worker=workers | st.just(WAITING))
    def fall_silent(self, worker):
        """Silence a worker for longer than a lease.

        `waiting` is no worker: its entries wait if there is no room.
        """
        for priority, stream in self.model.streams.items():
            for entry in stream.held_by(worker):
                self.calls.silence(worker, priority, entry.id)
                entry.silent = True

    def _holds_any(self, worker: str) -> bool:
        return any(stream.held_by(worker) for stream in self.model.streams.values())

    @precondition(lambda self: any(map(self._holds_any, WORKERS)))
    @rule(target=Working.attempts, worker=workers, heir=workers, alone=st.booleans())
    def die(self, worker, heir, alone):
        """Silence a worker for a lease, and let another go on. The first may still come back, as a zombie."""
        return multiple(*self._die(worker, heir, alone))

    def _die(self, worker: str, heir: str, alone: bool = True) -> list[Attempt]:
        self.fall_silent(worker)
        begun = [self._begin(delivered, alone) for delivered in self._claim(heir, PLENTY)]
        return [attempt for attempt in begun if attempt]

    @rule(target=Working.attempts, delivered=Working.delivered, heir=workers, deed=st.sampled_from(DEEDS))
    def lose_the_last_second(self, delivered, heir, deed):
        """Let the server forget an attempt, and assign its number again, while the first worker goes on."""
        model = copy.deepcopy(self.model)
        with self.calls.forgotten():
            forgotten = self._begin(delivered, alone=True)
            if forgotten:
                self.append(forgotten, 0, 2, twice=False)
        self.model = model
        attempts = self._die(delivered.worker, heir)
        if forgotten:
            name, *arguments = deed
            getattr(self, name)(forgotten, *arguments)
            attempts.append(forgotten)
        return multiple(*attempts)

    @rule(target=Working.attempts, attempt=Working.attempts, late=st.booleans(), alone=st.booleans())
    def begin_again(self, attempt, late, alone):
        """Repeat a begin, after a lost reply or for a suspect. The lease may have expired by then."""
        if late:
            self.fall_silent(attempt.worker)
        return self._begin(attempt.delivered, alone) or multiple()

    @rule(attempt=Working.attempts)
    def cancel_what_was_begun(self, attempt):
        self.cancel(attempt.job_id)

    @precondition(lambda self: self.model.ended)
    @rule(number=st.integers(0, 2))
    def let_the_result_expire(self, number):
        job_id = self.model.ended[number % len(self.model.ended)]
        keys, key = self.calls.keys, self.model.records[job_id].key
        self.calls.expire(keys.job(job_id), keys.tokens(job_id), *([keys.idem(key)] if key else []))
        self.model.forget(job_id)

    @precondition(lambda self: self.model.hurried)
    @rule()
    def let_rates_expire(self):
        self.calls.expire(*map(self.calls.keys.rate, self.model.hurried))
        self.model.hurried = set()

    @precondition(lambda self: self.model.records)
    @rule(job_id=job_ids, overdue=st.booleans())
    def expire(self, job_id, overdue):
        """Expire a job, as a worker's sweep or a waiting client does, after the deadline or before."""
        record = self.model.records.get(job_id)
        if overdue and record and record.has_deadline:
            self.calls.let_deadline_pass(job_id)
            record.overdue = True
        assert self.calls.expire_job(job_id) == self.model.expire(job_id)

    @precondition(lambda self: any(stream.order.starts for stream in self.model.streams.values()))
    @rule(priority=priorities)
    def lose_the_order(self, priority):
        keys = self.calls.keys
        self.calls.run(self.calls.redis.delete(keys.fair(priority), keys.ends(priority)))
        self.model.streams[priority].order.forget()

    @precondition(lambda self: any(map(self._holds_any, [*WORKERS, WAITING, RELEASED])))
    @rule(consumer=workers | st.sampled_from([WAITING, RELEASED]))
    def delete_a_consumer(self, consumer):
        """Delete a consumer, as an operator may. Its entries are then pending with no consumer."""
        self.calls.delete_consumer(consumer)
        for stream in self.model.streams.values():
            stream.lose(consumer)

    @precondition(lambda self: any(stream.held_by(LOST) for stream in self.model.streams.values()))
    @rule()
    def adopt(self):
        self.calls.adopt()
        for stream in self.model.streams.values():
            stream.adopt()

    @rule()
    def keep_house(self):
        """Make the calls that are allowed at any time."""
        self.calls.forget_consumers()
        assert self.calls.queue_is_empty() == self.model.empty

    # --------------------------------------------------------------------------------- what holds

    @invariant()
    def the_server_holds_what_the_model_says(self):
        snapshot, events = self.calls.snapshot()
        broken = broken_promises(snapshot, events) or differences(
            snapshot, expected(self.model, self.calls.keys)
        )
        assert not broken, "\n".join(broken)

    def teardown(self):
        try:
            if sys.exc_info()[0] is None:  # else a failure is being raised already
                self.drain()
        finally:
            self.calls.close()

    def drain(self):
        """Drain the queue with one healthy worker: every job ends, and only keys with a TTL are left."""
        self.adopt()
        for worker in (*WORKERS, RELEASED):
            self.fall_silent(worker)
        for _ in range(MAX_DEATHS):
            for job_id in self.model.delayed:
                self._make_due(job_id)
            self._promote()
            for delivered in [*self._claim("w1", PLENTY), *self._take("w1", PLENTY)]:
                if attempt := self._begin(delivered, alone=True):
                    self._run(attempt)
                self.bury(delivered)
        self.the_server_holds_what_the_model_says()
        snapshot, _ = self.calls.snapshot()
        assert {record["status"].terminal for record in snapshot.records.values()} <= {True}
        assert snapshot.entries == snapshot.order == snapshot.ends == {}
        assert snapshot.lasting == []

    def _run(self, attempt: Attempt) -> None:
        record, status, code = self.model.records[attempt.job_id], JobStatus.FINISHED, None
        if record.cancel:
            status = JobStatus.CANCELLED
        elif record.deaths >= MAX_DEATHS:
            status, code = JobStatus.FAILED, "worker_lost"
        else:
            self.append(attempt, 0, 1, twice=False)
        self.finish(attempt, 0, status, twice=False, code=code)
