"""Log the worker's throughput every ten seconds, instead of lines for each job."""

import asyncio
import logging
import time
from collections import Counter

from ingine.contract.record import JobStatus
from ingine.worker.hosting.engine_link import EngineHost
from ingine.worker.jobs import JobTable
from ingine.worker.logs import log_event
from ingine.worker.metrics import Metrics

logger = logging.getLogger(__name__)

INTERVAL_S = 10.0


class Throughput:
    """Logs the event `throughput` every `INTERVAL_S`, while `run` runs."""

    def __init__(self, engine: EngineHost, jobs: JobTable, metrics: Metrics):
        self._engine = engine
        self._jobs = jobs
        self._metrics = metrics

    async def run(self) -> None:
        before, at = self._totals(), time.monotonic()
        while True:
            await asyncio.sleep(INTERVAL_S)
            after, now = self._totals(), time.monotonic()
            self._report(after - before, now - at)
            before, at = after, now

    def _totals(self) -> Counter[str]:
        stats = self._engine.stats
        return Counter(
            prompt_tokens=stats.num_prompt_tokens,
            output_tokens=stats.num_output_tokens,
            prefix_hits=stats.prefix_cache_hit_tokens,
            prefix_queries=stats.prefix_cache_query_tokens,
            **self._metrics.num_ended,
        )

    def _report(self, done: Counter[str], seconds: float) -> None:
        """Log one interval. A worker without jobs logs nothing; one that holds jobs but computes nothing logs
        zeros."""
        if not done and not self._jobs:
            return
        stats, queried = self._engine.stats, done["prefix_queries"]
        log_event(
            logger,
            logging.INFO,
            "throughput",
            prompt_tokens_per_s=round(done["prompt_tokens"] / seconds, 1),
            output_tokens_per_s=round(done["output_tokens"] / seconds, 1),
            running=stats.num_running,
            waiting=stats.num_waiting,
            kv_usage=round(stats.kv_usage, 3),
            prefix_hit_rate=round(done["prefix_hits"] / queried, 3) if queried else None,
            finished=done[JobStatus.FINISHED],
            failed=done[JobStatus.FAILED],
        )
