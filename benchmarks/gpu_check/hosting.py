"""Compares an engine in a process of its own, as in a worker on a GPU, with the same engine alone.

They differ in the message interface alone: neither has a queue nor text, since a random model has no
tokenizer. `python -m benchmarks.gpu_check.hosting [--dry-run]` is the program of that process.
"""

import asyncio
import sys
import time

from benchmarks.gpu_check import streams
from benchmarks.gpu_check.cells import Cells, Figures
from benchmarks.gpu_check.plan import DRY, FULL, Plan
from benchmarks.gpu_check.random_model import kernels_for, kv_bytes_per_token
from benchmarks.gpu_check.subject import Subject
from ingine.engine.request import EngineRequest
from ingine.sampling_params import SamplingParams
from ingine.worker.hosting.engine_child import serve_engine
from ingine.worker.hosting.engine_link import EngineFailure, StepMessage
from ingine.worker.hosting.engine_process import EngineProcess


def run(plan: Plan, cells: Cells) -> None:
    alone = build(plan)
    command = [sys.executable, "-m", __name__, *(["--dry-run"] if plan is DRY else [])]
    host = EngineProcess(command, lambda: None)
    try:
        asyncio.run(_measure_all(alone, host, plan, cells))
    finally:
        host.close()


def build(plan: Plan) -> Subject:
    """Build an engine with only as much KV memory as the work needs, since the device holds two of them."""
    batch, context = max(plan.hosted), plan.compared[1]
    longest = context + streams.num_tokens(plan, batch, context) + 2 * plan.block_size
    return Subject.build(
        plan,
        kernels_for(plan, block_size=plan.block_size),
        max_num_seqs=batch,
        context=context,
        block_size=plan.block_size,
        kv_cache_bytes=batch * longest * kv_bytes_per_token(plan),
        async_scheduling=True,
    )


async def _measure_all(alone: Subject, host: EngineProcess, plan: Plan, cells: Cells) -> None:
    outputs: asyncio.Queue[tuple[float, StepMessage]] = asyncio.Queue()

    def deliver(message: StepMessage) -> None:
        outputs.put_nowait((time.perf_counter(), message))
        host.credit()

    await host.start(deliver)
    context = plan.compared[1]
    for batch in plan.hosted:
        rate = await _tokens_per_s(host, outputs, batch, context, plan)
        cells.run("process", {"batch": batch, "context": context}, _compare, alone, rate, batch, plan)
    await host.stop()


def _compare(alone: Subject, rate: float, batch: int, plan: Plan) -> Figures:
    alone_rate = alone.decode(plan, batch, plan.compared[1], bytes_per_s=None)["tokens_per_s"]
    return {"tokens_per_s": rate, "alone_tokens_per_s": alone_rate, "share_of_alone": rate / alone_rate}


async def _tokens_per_s(
    host: EngineProcess, outputs: asyncio.Queue, batch: int, context: int, plan: Plan
) -> float:
    """Tokens per second, by their arrival here, once all sequences have begun."""
    num_tokens = streams.num_tokens(plan, batch, context)
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    for index, prompt in enumerate(streams.prompts(batch, context, plan.shape.vocab_size)):
        host.add(EngineRequest(str(index), prompt, params, arrival_time=0.0))
    begun, num_finished, steps = set(), 0, []
    while num_finished < batch:
        moment, message = await outputs.get()
        if isinstance(message, EngineFailure):
            raise message.error
        begun.update(output.seq_id for output in message)
        num_finished += sum(output.finish_reason is not None for output in message)
        if len(begun) == batch:
            steps.append((moment, sum(len(output.token_ids) for output in message)))
    timed = steps[plan.num_warm_up_steps :][: plan.num_timed_steps + 1]
    made = sum(tokens for _, tokens in timed[1:])
    return made / (timed[-1][0] - timed[0][0])


if __name__ == "__main__":
    plan = DRY if "--dry-run" in sys.argv[1:] else FULL
    serve_engine(lambda: build(plan).engine)
