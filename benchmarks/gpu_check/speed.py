"""Rates of decoding and prefill over batches and contexts."""

from benchmarks.gpu_check import streams
from benchmarks.gpu_check.cells import Cells, Figures, Skipped
from benchmarks.gpu_check.plan import Plan
from benchmarks.gpu_check.random_model import kernels_for
from benchmarks.gpu_check.subject import Subject, bandwidth


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
    most_tokens, prefill_rate = 0, float("inf")
    for batch, context in in_order(plan):
        num_tokens = batch * context
        figures = cells.run(
            "decode",
            {"batch": batch, "context": context},
            *(_decode, subject, plan, batch, context, bytes_per_s, num_tokens / prefill_rate, cells),
        )
        if figures is not None and num_tokens >= most_tokens:  # fewer tokens get a smaller rate
            most_tokens, prefill_rate = num_tokens, figures["prefill_tokens_per_s"]


def in_order(plan: Plan) -> list[tuple[int, int]]:
    """Every batch and context: the most important first, then the cheapest, since time may run out."""
    others = {(batch, context) for batch in plan.batches for context in plan.contexts} - set(plan.first)
    return [*plan.first, *sorted(others, key=lambda pair: (pair[0] * pair[1], pair))]


def describe(subject: Subject) -> Figures:
    return {
        "attention": subject.attention,
        "weight_bytes": subject.weight_bytes,
        "kv_bytes_per_token": subject.kv_bytes_per_token,
        "num_kv_blocks": subject.engine.stats().num_blocks,
    }


def _decode(
    subject: Subject,
    plan: Plan,
    batch: int,
    context: int,
    bytes_per_s: float | None,
    prefill_s: float,
    cells: Cells,
) -> Figures:
    """Measure decoding. prefill_s: estimated time of the prompts."""
    if prefill_s > cells.seconds_left:
        raise Skipped(f"prompts would take {prefill_s:.0f} s, and {cells.seconds_left:.0f} s are left")
    return subject.decode(plan, batch, context, bytes_per_s=bytes_per_s)
