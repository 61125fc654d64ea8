"""Prometheus metrics of one worker. Every name is in `docs/operations.md`."""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

from ingine.contract.calls.begin import Begun
from ingine.contract.events import TerminalEvent
from ingine.contract.keys import Priority
from ingine.engine.outputs import EngineStats

_LATENCY_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_BETWEEN_S = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)


class _BulkHistogram(Collector):
    """A histogram that counts a value many times at once: all sequences of a step have the same latency."""

    def __init__(self, name: str, text: str, buckets: tuple[float, ...]):
        self._name, self._text, self._buckets = name, text, buckets
        self._counts = [0] * (len(buckets) + 1)
        self._sum = 0.0

    def observe(self, seconds: float, count: int) -> None:
        self._counts[bisect_left(self._buckets, seconds)] += count
        self._sum += seconds * count

    def describe(self) -> Iterator[HistogramMetricFamily]:
        yield HistogramMetricFamily(self._name, self._text)

    def collect(self) -> Iterator[HistogramMetricFamily]:
        bounds = [*(str(float(bound)) for bound in self._buckets), "+Inf"]
        cumulated = list(zip(bounds, accumulate(self._counts), strict=True))
        yield HistogramMetricFamily(self._name, self._text, buckets=cumulated, sum_value=self._sum)


class Metrics:
    """A worker's metrics, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._totals: dict[Counter, int] = {}
        self.num_ended: dict[str, int] = defaultdict(int)
        """Number of jobs that ended here, by status."""

        def make(kind, name: str, text: str, labels=(), **options):
            return kind(f"ingine_{name}", text, labels, registry=self.registry, **options)

        self.queue_depth = make(
            Gauge, "queue_depth", "Entries in a jobs stream: waiting and running.", ["priority", "partition"]
        )
        self.delayed_depth = make(Gauge, "delayed_depth", "Jobs that are delayed.", ["partition"])
        self.dead_depth = make(Gauge, "dead_letters_depth", "Entries in the dead letters.", ["partition"])
        self.running = make(Gauge, "sequences_running", "Sequences in the engine's batch.")
        self.waiting = make(Gauge, "sequences_waiting", "Sequences that wait in the engine.")
        self.jobs_held = make(Gauge, "jobs_held", "Jobs that this worker holds a lease on.")
        self.kv_usage = make(Gauge, "kv_usage_ratio", "Share of KV blocks that sequences hold.")
        self.prefix_hits = make(Counter, "prefix_cache_hit_tokens", "Prompt tokens found cached.")
        self.prefix_queries = make(Counter, "prefix_cache_queried_tokens", "Prompt tokens looked up.")
        self.preemptions = make(Counter, "preemptions", "Sequences preempted for lack of KV blocks.")
        self.draft_tokens = make(Counter, "draft_tokens", "Tokens that speculation proposed.")
        self.accepted_draft_tokens = make(
            Counter, "accepted_draft_tokens", "Draft tokens accepted as output."
        )

        self.jobs = make(Counter, "jobs", "Jobs that ended here.", ["status"])
        self.prompt_tokens = make(Counter, "prompt_tokens", "Tokens of the prompts begun here.")
        self.output_tokens = make(Counter, "output_tokens", "Tokens committed here.")
        self.redeliveries = make(Counter, "redeliveries", "Jobs begun here under an attempt after the first.")
        self.fenced_writes = make(Counter, "fenced_writes", "Jobs dropped because another worker has them.")
        self.dead_letters = make(Counter, "dead_letters", "Entries buried here.")
        self.log_rollbacks = make(
            Counter, "log_rollbacks", "Logs found shorter than what had been committed."
        )
        self.engine_failures = make(Counter, "engine_failures", "Steps that raised.")

        self._first_token = make(
            Histogram, "first_token_seconds", "Submit to first token.", buckets=_LATENCY_S
        )
        self._between = _BulkHistogram(
            "ingine_between_tokens_seconds", "Time per token after the first.", _BETWEEN_S
        )
        self.registry.register(self._between)
        self._queue_wait = make(
            Histogram, "queue_wait_seconds", "Submit to first begin.", ["priority"], buckets=_LATENCY_S
        )

    def began(self, begun: Begun, priority: Priority) -> None:
        """Count a job begun: its wait in the queue or, after the first attempt, a redelivery."""
        if begun.attempt == 1:
            self._queue_wait.labels(priority).observe((begun.now - begun.submitted_at) / 1000)
        else:
            self.redeliveries.inc()

    def first_token(self, seconds: float) -> None:
        self._first_token.observe(seconds)

    def between_tokens(self, seconds: float, count: int) -> None:
        self._between.observe(seconds, count)

    def ended(self, event: TerminalEvent) -> None:
        self.jobs.labels(event.status).inc()
        self.num_ended[event.status] += 1

    def observe_engine(self, stats: EngineStats, num_jobs: int) -> None:
        """Update the gauges, and add to the counters what has grown since the last call."""
        self.jobs_held.set(num_jobs)
        self.running.set(stats.num_running)
        self.waiting.set(stats.num_waiting)
        self.kv_usage.set(stats.kv_usage)
        self._count_up(self.prefix_hits, stats.prefix_cache_hit_tokens)
        self._count_up(self.prefix_queries, stats.prefix_cache_query_tokens)
        self._count_up(self.preemptions, stats.num_preemptions)
        self._count_up(self.draft_tokens, stats.num_draft_tokens)
        self._count_up(self.accepted_draft_tokens, stats.num_accepted_tokens)

    def _count_up(self, counter: Counter, total: int) -> None:
        counter.inc(total - self._totals.get(counter, 0))
        self._totals[counter] = total
