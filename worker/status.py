"""A worker's state, and the contents of its heartbeats and of its first log line."""

import asyncio
import logging
from typing import Any

import ingine
from ingine.contract.keys import GROUP
from ingine.worker.grammar_version import LLGUIDANCE_VERSION
from ingine.worker.hosting.engine_link import EngineHost
from ingine.worker.jobs import JobTable
from ingine.worker.logs import log_event
from ingine.worker.metrics import Metrics
from ingine.worker.partition import Partition
from ingine.worker.served_model import ServedModel
from ingine.worker.settings import WorkerSettings

logger = logging.getLogger(__name__)


class Status:
    """Reads the worker's parts. The caller fills `partitions` once they are known, and sets `stopping` when
    the hand-over begins."""

    def __init__(
        self,
        settings: WorkerSettings,
        worker_id: str,
        model: ServedModel,
        engine: EngineHost,
        jobs: JobTable,
        metrics: Metrics,
        partitions: list[Partition],
        stopping: asyncio.Event,
    ):
        self._settings = settings
        self._worker_id = worker_id
        self._model = model
        self._engine = engine
        self._jobs = jobs
        self._metrics = metrics
        self._partitions = partitions
        self._stopping = stopping

    def state(self) -> str:
        """`serving`, `paused` (all partitions are) or `draining`."""
        if self._stopping.is_set():
            return "draining"
        paused = {partition.intake.paused for partition in self._partitions}
        return "paused" if paused == {True} else "serving"

    def heartbeat(self) -> dict[str, Any]:
        """The worker's entry in the queue's workers hash, without the time."""
        stats = self._engine.stats
        return {
            "name": self._settings.worker_id,
            "state": self.state(),
            "model": self._model.name,
            "fingerprint": self._model.fingerprint,
            "version": ingine.__version__,
            "num_jobs": len(self._jobs),
            "num_running": stats.num_running,
            "num_waiting": stats.num_waiting,
            "kv_usage": round(stats.kv_usage, 4),
            "num_prompt_tokens": stats.num_prompt_tokens,
            "num_output_tokens": stats.num_output_tokens,
            "num_ended": sum(self._metrics.num_ended.values()),
            "llguidance": LLGUIDANCE_VERSION,
        }

    def log_ready(self, where: str, http_port: int | None) -> None:
        """Log that the worker is ready. `where`: the server's URL without its password."""
        log_event(
            logger,
            logging.INFO,
            "worker ready",
            worker=self._worker_id,
            queue=self._settings.queue,
            partitions=len(self._partitions),
            redis=where,
            model=self._model.name,
            fingerprint=self._model.fingerprint,
            group=GROUP,
            http=http_port and f"{self._settings.http_host}:{http_port}",
        )
