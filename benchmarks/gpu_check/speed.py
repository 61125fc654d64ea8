"""Rates of decoding and prefill over batches and contexts, and where the time of a step goes."""

from benchmarks.gpu_check import streams
from benchmarks.gpu_check.cells import Cells
from benchmarks.gpu_check.plan import Plan
from benchmarks.gpu_check.random_model import kernels_for
from benchmarks.gpu_check.subject import Subject, bandwidth
from benchmarks.gpu_check.trace import trace_decode


def run(plan: Plan, cells: Cells) -> None:
    bytes_per_s = bandwidth(plan, cells)
    subject = Subject.build(
        plan,
        kernels_for(plan, block_size=plan.block_size),
        max_num_seqs=max(plan.batches),
        context=max(plan.contexts),
        block_size=plan.block_size,
        async_scheduling=True,
    )
    subject.warm_up(plan)
    cells.run("engine", {}, describe, subject)
    context = plan.compared[1]
    for batch in plan.streams:
        settings = {"batch": batch, "context": context, "num_new_tokens": plan.num_stream_tokens}
        cells.run(
            "ingine", settings, streams.generate, subject.engine, batch, context, plan.num_stream_tokens
        )
    for batch in plan.traced:
        cells.run("trace", {"batch": batch, "context": context}, trace_decode, subject.engine, batch, plan)
    # The cheapest first, since time may run out.
    grid = [(batch, context) for batch in plan.batches for context in plan.contexts]
    for batch, context in sorted(grid, key=lambda pair: pair[0] * pair[1]):
        settings = {"batch": batch, "context": context}
        cells.run("decode", settings, decode, subject, plan, batch, context, bytes_per_s)


def describe(subject: Subject) -> dict:
    return {
        "attention": subject.attention,
        "weight_bytes": subject.weight_bytes,
        "kv_bytes_per_token": subject.kv_bytes_per_token,
        "num_kv_blocks": subject.engine.stats().num_blocks,
    }


def decode(subject: Subject, plan: Plan, batch: int, context: int, bytes_per_s: float | None) -> dict:
    return subject.decode(plan, batch, context, bytes_per_s=bytes_per_s)
