"""The whole machine: producers, workers, time and accidents, in any order.

The model predicts each call's answer. After each the server holds what the model says, and breaks no promise.
"""

import sys

from hypothesis import strategies as st
from hypothesis.stateful import invariant, multiple, rule

from ingine.wire import JobStatus
from tests.contract.calls import Attempt
from tests.contract.model import MAX_DEATHS
from tests.contract.producing import WORKERS, Producing, job_ids, priorities, tenants
from tests.contract.snapshot import broken_promises, expected
from tests.contract.working import Working, workers


class Contract(Producing, Working):
    @rule(job_id=job_ids, due=st.booleans())
    def promote(self, job_id, due):
        if due and job_id in self.model.delayed:
            self.calls.set_due(job_id, 1)
            self.model.due.add(job_id)
        self._promote()

    def _promote(self) -> None:
        self.calls.run(self.calls.queue("w1").promote())
        self.model.promote({job_id: self.calls.entry_of(job_id) for job_id in self.model.due})

    @rule(worker=workers)
    def fall_silent(self, worker):
        for priority, stream in self.model.streams.items():
            for entry in stream.held_by(worker):
                self.calls.silence(worker, priority, entry.id)
                entry.silent = True

    @rule(target=Working.attempts, worker=workers, heir=workers)
    def die(self, worker, heir):
        """The worker is not heard of for a lease; another goes on. (It may yet come back: a zombie.)"""
        self.fall_silent(worker)
        begun = [self._begin(delivered, alone=True) for delivered in self._claim(heir, 100)]
        return multiple(*filter(None, begun))

    @rule(job_id=job_ids)
    def let_the_result_expire(self, job_id):
        record = self.model.records.get(job_id)
        if record and record.status.terminal:
            self.calls.expire(self.calls.keys.job(job_id), self.calls.keys.tokens(job_id))
            self.model.forget(job_id)

    @rule(key=st.sampled_from(["k1", "k2"]), tenant=tenants)
    def let_keys_expire(self, key, tenant):
        if self.model.idempotency.pop(key, None):
            self.calls.expire(self.calls.keys.idem(key))
        if (tenant or "") in self.model.hurried:
            self.model.hurried.remove(tenant or "")
            self.calls.expire(self.calls.keys.rate(tenant or ""))

    @rule(priority=priorities)
    def lose_the_order(self, priority):
        keys = self.calls.keys
        self.calls.run(self.calls.redis.delete(keys.fair(priority), keys.shares(priority)))
        self.model.streams[priority].order.forget()

    @rule()
    def forget_idle_consumers(self):
        self.calls.forget_consumers()

    # --------------------------------------------------------------------------------- what holds

    @invariant()
    def the_server_holds_what_the_model_says(self):
        snapshot, events = self.calls.snapshot()
        assert broken_promises(snapshot, events) == []
        assert snapshot == expected(self.model, self.calls.keys)

    def teardown(self):
        try:
            if sys.exc_info()[0] is None:  # else there is a failure to be told of already
                self.drain()
        finally:
            self.calls.close()

    def drain(self):
        """One healthy worker, and time: every job ends, and nothing is left but what has a TTL."""
        for worker in WORKERS:
            self.fall_silent(worker)
        for _ in range(MAX_DEATHS):
            for job_id in self.model.delayed:
                self.promote(job_id, due=True)
            for delivered in [*self._claim("w1", 100), *self._take("w1", 100)]:
                if attempt := self._begin(delivered, alone=True):
                    self._run(attempt)
                self.bury(delivered)
        self.the_server_holds_what_the_model_says()
        snapshot, _ = self.calls.snapshot()
        assert {record["status"].terminal for record in snapshot.records.values()} <= {True}
        assert snapshot.entries == snapshot.order == snapshot.shares == {}
        assert snapshot.lasting in ([], [self.calls.keys.dead])

    def _run(self, attempt: Attempt) -> None:
        record, status, code = self.model.records[attempt.job_id], JobStatus.FINISHED, None
        if record.cancel:
            status = JobStatus.CANCELLED
        elif record.deaths >= MAX_DEATHS:
            status, code = JobStatus.FAILED, "worker_lost"
        else:
            self.append(attempt, 0, 1, twice=False)
        self.finish(attempt, 0, status, twice=False, code=code)
