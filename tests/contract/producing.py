"""The rules of producers, and the base that all parts of the machine share."""

from collections.abc import Callable

from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, precondition, rule
from redis.asyncio import Redis

from ingine.contract.jobs import Job, encode_job
from ingine.contract.keys import Priority
from ingine.producer.submission import Submission, build_submission
from tests.contract.calls import Calls
from tests.contract.fair_order import Entry
from tests.contract.model import Limits, Model

WORKERS = ("w1", "w2", "w3")

job_ids = st.sampled_from("abcdef")
tenants = st.sampled_from([None, "gold", "flood"])
priorities = st.sampled_from(Priority)
reply_names = st.sampled_from([None, "batch"])


class Machine(RuleBasedStateMachine):
    make_redis: Callable[[], Redis]
    real = True
    """False on fakeredis, where claims come in order of ids, and reading one's own pending entries renews
    nothing."""

    def __init__(self):
        super().__init__()
        self.calls, self.model = Calls(type(self).make_redis()), Model(weights={"gold": 3.0})
        self.calls.run(self.calls.redis.hset(self.calls.keys.settings, "weight:gold", 3))
        self.num_new = 0
        self.num_reads = dict.fromkeys(WORKERS, 0)


class Producing(Machine):
    submissions = Bundle("submissions")

    @rule(
        target=submissions, job_id=job_ids, priority=priorities, tenant=tenants, reply_to=reply_names,
        size=st.sampled_from([1, 80]), key=st.sampled_from([None, None, None, "k1", "k2"]),
        delayed=st.sampled_from([False, False, True]), deadline=st.booleans(), n=st.sampled_from([1, 1, 3]),
    )  # fmt: skip
    def submit(self, job_id, priority, tenant, size, reply_to, key, delayed, deadline=False, n=1):
        submission = build_submission(
            "x" * size,
            job_id=job_id,
            priority=priority,
            tenant=tenant,
            reply_to=reply_to,
            idempotency_key=key,
            not_before_s=1e6 if delayed else None,
            deadline_s=1e7 if deadline else None,
            max_tokens=size,
            n=n,
        )
        self._submit(submission)
        return submission

    @rule(submission=submissions)
    def submit_again(self, submission):
        """Repeat a submission, whose reply was lost, or an old one, with the same nonce."""
        self._submit(submission)

    def _submit(self, submission: Submission) -> None:
        refusal = self.model.refusal(submission)
        verdict, detail = self.calls.submit(submission)
        if verdict == "rate":
            assert 0 < int(detail) <= 1_001_000
            detail = ""
        job_id = submission.job.id
        assert (verdict, detail) == (refusal or self.model.accept(submission, self.calls.entry_of(job_id)))

    @rule(submission=submissions, wrong=st.integers(2, 4))
    def submit_to_another_number_of_partitions(self, submission, wrong):
        assert self.calls.submit(submission, wrong) == self.model.refusal(submission, wrong)

    @rule(job_id=job_ids, priority=priorities, reply_to=reply_names)
    def submit_bare(self, job_id, priority, reply_to):
        raw = encode_job(Job(id=job_id, prompt="x", reply_to=reply_to))
        self.model.streams[priority].add(Entry(self.calls.xadd(priority, raw), job_id, raw))

    @rule(
        priority=priorities, tenant=tenants, costs=st.lists(st.integers(1, 70), min_size=2, max_size=4),
        choices=st.sampled_from(["", "", "2", "3", "0", "129", "9" * 15, "9" * 16, "-2", "2.0", "x", "\xff"]),
    )  # fmt: skip
    def flood(self, priority, tenant, costs, choices=""):
        """Submit jobs with tenant, cost and choices, as `submit` does. The last may be wrong."""
        for cost in costs:
            self.num_new += 1
            job_id = f"new-{self.num_new}"
            raw = encode_job(Job(id=job_id, prompt="x"))
            fields = {"choices": choices} if choices else {}
            entry_id = self.calls.xadd(priority, raw, tenant=tenant or "", cost=cost, **fields)
            self.model.streams[priority].add(Entry(entry_id, job_id, raw, tenant or "", cost, choices))

    @rule(priority=priorities, raw=st.sampled_from([b"", b"\xc1", b"\x01"]))
    def submit_rubbish(self, priority, raw):
        self.model.streams[priority].add(Entry(self.calls.xadd(priority, raw), None, raw))

    @rule(
        target=submissions, priority=priorities, tenant=tenants, delayed=st.booleans(), twice=st.booleans(),
        limit=st.sampled_from([None, "max_jobs", "max_bytes", "max_job_bytes"]), room=st.integers(-1, 1),
    )  # fmt: skip
    def submit_at_a_limit(self, priority, tenant, delayed, twice, limit, room):
        """Submit a new job with just enough room for it, or a little more or less."""
        self.num_new += 1
        submission = build_submission(
            "x",
            job_id=f"new-{self.num_new}",
            priority=priority,
            tenant=tenant,
            not_before_s=1e6 if delayed else None,
        )
        size = len(submission.raw)
        needed = {
            "max_jobs": self.model.num_jobs + 1,
            "max_bytes": self.model.num_bytes + size,
            "max_job_bytes": size,
        }
        self._set_limits({limit: needed[limit] + room} if limit else {})
        for _ in range(1 + twice):
            self._submit(submission)
        self._set_limits({})
        return submission

    @rule(one_a_tenant=st.booleans())
    def limit_the_rate(self, one_a_tenant):
        self.model.limits.one_a_tenant = one_a_tenant
        self._set_limits({})

    def _set_limits(self, given: dict[str, int]) -> None:
        one_a_tenant = self.model.limits.one_a_tenant
        self.model.limits = Limits(**given, one_a_tenant=one_a_tenant)
        settings, redis = self.calls.keys.settings, self.calls.redis
        self.calls.run(redis.hdel(settings, "max_jobs", "max_bytes", "max_job_bytes", "max_jobs_per_s"))
        fields = given | ({"max_jobs_per_s": 0.001} if one_a_tenant else {})
        if fields:
            self.calls.run(redis.hset(settings, mapping=fields))

    @precondition(lambda self: self.model.dead)
    @rule(number=st.integers(0, 2))
    def requeue(self, number):
        """Requeue a dead letter as a bare submission, unless its job id is taken."""
        number %= len(self.model.dead)
        letter = self.model.dead[number]
        entry_id = self.calls.requeue(self.calls.letter_ids()[number])
        assert (entry_id is None) == (letter.entry.job_id in self.model.records)
        if entry_id is not None:
            self.model.requeue(letter, entry_id)

    @precondition(lambda self: self.model.records)
    @rule(job_id=job_ids)
    def cancel(self, job_id):
        assert self.calls.cancel(job_id) == self.model.cancel(job_id)

    @precondition(lambda self: self.model.not_running)
    @rule(number=st.integers(0, 2))
    def cancel_what_does_not_run(self, number):
        self.cancel(self.model.not_running[number % len(self.model.not_running)])
