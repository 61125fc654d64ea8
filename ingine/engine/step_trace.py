"""Logs one line for each step at level DEBUG, which shows how continuous batching works."""

import logging
import time
from collections.abc import Callable

from ingine.engine.outputs import EngineStats, SeqOutput
from ingine.engine.schedule.scheduler import ScheduledBatch

logger = logging.getLogger("ingine.engine.engine")


def log_step(
    batch: ScheduledBatch, outputs: list[SeqOutput], stats: Callable[[], EngineStats], started: float
) -> None:
    """Log what a step computed and what came of it, if level DEBUG is enabled.

    With two sequences in prefill and three in decode the line is, for example:

    prefill 96 tok/2 seq | decode 3 | 99 tok | blocks 9 used 55 free | 21.4 ms | admitted c d | finished
    a:stop
    """
    if not logger.isEnabledFor(logging.DEBUG):
        return
    prefills = [num_tokens for num_tokens in batch.num_tokens if num_tokens > 1]
    now = stats()
    drafts = f", {batch.num_draft_tokens} drafted" if batch.num_draft_tokens else ""
    parts = [
        f"prefill {sum(prefills)} tok/{len(prefills)} seq",
        f"decode {len(batch.seqs) - len(prefills)}{drafts}",
        f"{sum(batch.num_tokens)} tok",
        f"blocks {now.num_blocks - now.num_free_blocks} used {now.num_free_blocks} free",
        f"{(time.perf_counter() - started) * 1e3:.1f} ms",
    ]
    events = {
        "admitted": [seq.seq_id for seq in batch.admitted],
        "preempted": [seq.seq_id for seq in batch.preempted],
        "finished": [f"{output.seq_id}:{output.finish_reason}" for output in outputs if output.finish_reason],
    }
    parts += [f"{name} {' '.join(seq_ids)}" for name, seq_ids in events.items() if seq_ids]
    logger.debug(" | ".join(parts))
