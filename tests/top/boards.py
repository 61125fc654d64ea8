"""Boards with made-up queues, for tests without a server."""

from collections import Counter
from typing import Any

from ingine.producer import QueueInfo
from ingine.producer.watch import RunningJob, Snapshot
from ingine.top.board import Board
from ingine.top.figures import Figures, History


def queue_info(workers: dict[str, dict[str, Any]] | None = None, **fields: Any) -> QueueInfo:
    given = {
        "queue": "chat",
        "waiting": {"high": 3, "normal": 120, "low": 9000},
        "running": {"high": 1, "normal": 2, "low": 0},
        "num_delayed": 4,
        "num_bytes": 3 << 20,
        "num_partitions": 1,
        "max_jobs": 100_000,
        "max_bytes": 1 << 30,
        "max_job_bytes": 1 << 20,
        "max_jobs_per_s": None,
        "weights": {},
        "paused": False,
        "draining": [],
        "num_dead": 2,
    }
    return QueueInfo(**given | {"workers": WORKERS if workers is None else workers} | fields)


def beat(silent_s: float = 0, **fields: Any) -> dict[str, Any]:
    state = "lost" if silent_s > 30 else "silent" if silent_s > 5 else "serving"
    given = {"name": "w", "state": state, "model": "Qwen/Qwen3-0.6B", "num_jobs": 3, "num_running": 2}
    given |= {"kv_usage": 0.25, "num_output_tokens": 1000, "num_ended": 10, "at_s": 100, "silent_s": silent_s}
    return given | fields


WORKERS = {"gpu-0-a1": beat(), "gpu-1-b2": beat(kv_usage=0.985), "gpu-2-c3": beat(silent_s=12)}


def job(job_id: str, **fields: Any) -> RunningJob:
    given = {
        "priority": "normal",
        "tenant": "acme",
        "worker": "gpu-0-a1",
        "attempt": 1,
        "position": 42,
        "age_s": 3.21,
        "submitted_at_ms": 10_000,
        "began_at_ms": 10_500,
        "first_token_at_ms": 11_500,
    }
    return RunningJob(job_id, **given | fields)


JOBS = [job("first", priority="high"), job("second", text="Once upon a time"), job("third", attempt=2)]


def board(info: QueueInfo | None = None, jobs: list[RunningJob] | None = None, **fields: Any) -> Board:
    made = Board("chat", **fields)
    made.tenants = Counter({"acme": 130, "": 40, "beta": 30})
    snapshot = Snapshot(info or queue_info(), JOBS if jobs is None else jobs)
    made.update(snapshot, Figures(tokens_per_s=152.4, ended_per_s=3.25), 0.0)
    return made


def figures(*snapshots: tuple[float, Snapshot]) -> Figures:
    """What the last of these snapshots, read at these times, leads to."""
    history = History()
    for now_s, snapshot in snapshots[:-1]:
        history.add(snapshot, now_s)
    now_s, snapshot = snapshots[-1]
    return history.add(snapshot, now_s)
