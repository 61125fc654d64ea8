"""Work for an engine: sequences with random prompts, none of which is a prefix of another."""

import time
from statistics import median

import numpy as np

from benchmarks.gpu_check.cells import Figures, Skipped
from benchmarks.gpu_check.plan import Plan
from ingine.engine.engine import Engine
from ingine.engine.request import EngineRequest
from ingine.errors import EngineError
from ingine.sampling_params import SamplingParams


def prompts(batch: int, context: int, vocab_size: int, seed: int = 0) -> list[list[int]]:
    return np.random.default_rng(seed).integers(vocab_size, size=(batch, context)).tolist()


def num_tokens(plan: Plan, batch: int, context: int) -> int:
    """Maximum tokens of a sequence while decoding is timed or traced. The first sequences already decode
    while the prompts of the others are computed.
    """
    num_prefill_steps = -(-batch * context // max(plan.num_batched_tokens - batch, 1))
    return num_prefill_steps + plan.num_warm_up_steps + plan.num_timed_steps + 8


def add(engine: Engine, batch: int, context: int, num_tokens: int) -> None:
    """Add sequences. Raises Skipped if KV memory cannot hold all of them."""
    # The scheduler admits no sequence without a spare block.
    num_blocks = batch * (-(-(context + num_tokens) // engine.config.block_size) + 1)
    if num_blocks > engine.stats().num_blocks:
        raise Skipped(f"needs {num_blocks} KV blocks, and there are {engine.stats().num_blocks}")
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    for index, prompt in enumerate(prompts(batch, context, engine.model_config.vocab_size)):
        engine.add(EngineRequest(str(index), prompt, params))


def start(engine: Engine, batch: int, context: int, plan: Plan) -> tuple[float, float]:
    """Step until each of `batch` sequences has a token, and then through the warm-up.

    Returns the seconds of the former, and the mean length of a sequence after both.
    """
    add(engine, batch, context, num_tokens(plan, batch, context))
    began, begun, num_output_tokens = time.perf_counter(), set(), 0
    while len(begun) < batch:
        for output in engine.step():
            begun.add(output.seq_id)
            num_output_tokens += len(output.token_ids)
    prefill_s = time.perf_counter() - began
    for _ in range(plan.num_warm_up_steps):
        num_output_tokens += sum(len(output.token_ids) for output in engine.step())
    return prefill_s, context + num_output_tokens / batch


def decode(engine: Engine, batch: int, plan: Plan) -> tuple[float, float]:
    """Seconds per step, mean and median, once all sequences have begun.

    Raises EngineError if a step does not give each a token: some were preempted, so the time means nothing.
    """
    times, num_output_tokens = [time.perf_counter()], 0
    for _ in range(plan.num_timed_steps):
        num_output_tokens += sum(len(output.token_ids) for output in engine.step())
        times.append(time.perf_counter())
    if num_output_tokens != batch * plan.num_timed_steps:
        raise EngineError(f"{num_output_tokens} tokens in {plan.num_timed_steps} steps of {batch} sequences")
    return (times[-1] - times[0]) / plan.num_timed_steps, median(np.diff(times).tolist())


def finish(engine: Engine) -> None:
    """Abort what is left, also after an error."""
    while engine.has_unfinished:
        for seq_id in engine.running_seq_ids:
            engine.abort(seq_id)
        engine.step()


def generate(engine: Engine, batch: int, context: int, num_tokens: int) -> Figures:
    """Generate all tokens of `batch` streams from the start, as a user does."""
    began = time.perf_counter()
    add(engine, batch, context, num_tokens)
    token_times = []
    while engine.has_unfinished:
        outputs = engine.step()
        token_times += [time.perf_counter()] * sum(len(output.token_ids) for output in outputs)
    return rates(began, token_times)


def rates(began: float, token_times: list[float]) -> Figures:
    """Tokens per second from the call on, and from the first token on, which excludes the setup."""
    return {
        "wall_s": max(token_times) - began,
        "tokens_per_s": len(token_times) / (max(token_times) - began),
        "tokens_per_s_after_the_first": (len(token_times) - 1) / (max(token_times) - min(token_times)),
    }
