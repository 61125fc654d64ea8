"""Work for an engine: sequences with random prompts, none of which is the beginning of another."""

import time
from statistics import median

import numpy as np

from benchmarks.gpu_check.cells import Figures, Skipped
from benchmarks.gpu_check.plan import Plan
from ingine.engine import Engine
from ingine.errors import EngineError
from ingine.sampling_params import SamplingParams


def prompts(batch: int, context: int, vocab_size: int, seed: int = 0) -> list[list[int]]:
    return np.random.default_rng(seed).integers(vocab_size, size=(batch, context)).tolist()


def num_decode_tokens(plan: Plan) -> int:
    """Tokens that a sequence gets while decoding is timed or traced, and some to spare."""
    return plan.num_warm_up_steps + plan.num_timed_steps + 8


def add_streams(engine: Engine, batch: int, context: int, num_tokens: int) -> None:
    """Raises Skipped where KV memory does not hold them all at once."""
    block_size, stats = engine.config.block_size, engine.stats()
    num_blocks = batch * (
        -(-(context + num_tokens) // block_size) + 1
    )  # the scheduler admits with one to spare
    if num_blocks > stats.num_blocks:
        raise Skipped(f"needs {num_blocks} KV blocks, and there are {stats.num_blocks}")
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    for index, prompt in enumerate(prompts(batch, context, engine.model_config.vocab_size)):
        engine.add(str(index), prompt, params)


def prefill(engine: Engine, batch: int) -> float:
    """Step until each of `batch` sequences has a token. Returns the seconds that it took."""
    began, begun = time.perf_counter(), set()
    while len(begun) < batch:
        begun |= {output.seq_id for output in engine.step() if output.token_ids}
    return time.perf_counter() - began


def decode(engine: Engine, batch: int, plan: Plan) -> tuple[float, float]:
    """Seconds a step, mean and median, of sequences that have all begun.

    Raises EngineError if a step does not give each a token: some were preempted, and the time says nothing.
    """
    for _ in range(plan.num_warm_up_steps):
        engine.step()
    times, num_tokens = [time.perf_counter()], 0
    for _ in range(plan.num_timed_steps):
        num_tokens += sum(len(output.token_ids) for output in engine.step())
        times.append(time.perf_counter())
    if num_tokens != batch * plan.num_timed_steps:
        raise EngineError(f"{num_tokens} tokens in {plan.num_timed_steps} steps of {batch} sequences")
    return (times[-1] - times[0]) / plan.num_timed_steps, median(np.diff(times).tolist())


def finish(engine: Engine) -> None:
    """Give up what is left, also after an error."""
    while engine.has_unfinished:
        for seq_id in engine.running_seq_ids:
            engine.abort(seq_id)
        engine.step()


def generate(engine: Engine, batch: int, context: int, num_tokens: int) -> Figures:
    """All tokens of `batch` streams from nothing: what a user waits for."""
    began = time.perf_counter()
    add_streams(engine, batch, context, num_tokens)
    token_times = []
    while engine.has_unfinished:
        outputs = engine.step()
        token_times += [time.perf_counter()] * sum(len(output.token_ids) for output in outputs)
    return rates(began, token_times)


def rates(began: float, token_times: list[float]) -> Figures:
    """Tokens a second from the call on, and from the first token on, which leaves out the setting-up."""
    return {
        "wall_s": max(token_times) - began,
        "tokens_per_s": len(token_times) / (max(token_times) - began),
        "tokens_per_s_after_the_first": (len(token_times) - 1) / (max(token_times) - min(token_times)),
    }
