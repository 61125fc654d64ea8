"""Measures the cost of a step without the model: `python benchmarks/step_overhead.py [--profile]`.

The engine, the tokenizer and the text are real. The model costs nothing: its logits are prepared, and cover
only the first 512 tokens of the vocabulary, so that greedy sampling is timed without its kernel. With top_p,
kernels still take most of the time; `benchmarks/sampler.py` measures them. Times are the thread's processor
time, which other work on the machine does not affect.
"""

import argparse
import cProfile
import pstats
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace

import torch

import ingine.engine.run.model_runner
from ingine.engine.communication.parallel import SINGLE
from ingine.engine.config import EngineConfig
from ingine.engine.engine import Engine
from ingine.engine.kernels.select import REFERENCE, select_kernels
from ingine.engine.models.config import ModelConfig
from ingine.engine.request import EngineRequest
from ingine.engine.store.model_store import DEFAULT_MODEL, resolve_model
from ingine.engine.text.tokenizer import Tokenizer
from ingine.sampling_params import SamplingParams

BATCH_SIZES = (32, 256)
NUM_PROMPT_TOKENS, NUM_STEPS, NUM_ROUNDS = 41, 64, 5
VOCAB_SIZE = 512
_COMMON = {"max_tokens": 10_000, "ignore_eos": True}
KINDS = {
    "greedy": SamplingParams(temperature=0, **_COMMON),
    "greedy, a stop string": SamplingParams(temperature=0, stop="Question:", **_COMMON),
    "top_p 0.95": SamplingParams(temperature=0.8, top_p=0.95, seed=1, **_COMMON),
}


class StandInDecoder:
    """A `Model` without weights. Each sequence gets another row of logits in each step."""

    device, dtype = torch.device("cpu"), torch.float32
    kernels = replace(REFERENCE, sampling=select_kernels(device, dtype).sampling)
    parallel = SINGLE
    mapped_bytes = 0

    def __init__(self, config: ModelConfig):
        self.config = config
        # Around the ids of letters, which are texts of their own.
        self._logits = torch.randn(4096, VOCAB_SIZE, generator=torch.Generator().manual_seed(0)) * 4
        self._logits[:, :40] = -100.0
        self._offset = 0

    def forward(self, input_ids, positions, kv_caches, metadata) -> torch.Tensor:
        return input_ids

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        self._offset = (self._offset + 97) % (len(self._logits) - len(hidden))
        return self._logits[self._offset : self._offset + len(hidden)].clone()

    def allocate_kv_caches(self, num_blocks: int, block_size: int) -> list:
        return []

    def bytes_per_block(self, block_size: int) -> int:
        return 1

    def numerics(self) -> list[str]:
        return []


class Clock:
    """Adds up the time of each part of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def watch(self, owner: object, name: str, part: str) -> None:
        """Time every call of `owner.name`."""
        function: Callable = getattr(owner, name)

        def timed(*args, **options):
            began = time.thread_time()
            try:
                return function(*args, **options)
            finally:
                self.seconds[part] += time.thread_time() - began

        setattr(owner, name, timed)


def make_engine(batch_size: int, model: StandInDecoder, tokenizer: Tokenizer) -> Engine:
    config = EngineConfig(
        DEFAULT_MODEL,
        max_num_seqs=batch_size,
        max_num_batched_tokens=batch_size * NUM_PROMPT_TOKENS,
        kv_cache_bytes=batch_size * 64,  # a block is a byte here
    )
    return Engine(config, model=model, tokenizer=tokenizer)


def fill(engine: Engine, batch_size: int, params: SamplingParams) -> float:
    """Add `batch_size` sequences. Returns the seconds of the step that admits and prefills all of them."""
    for index in range(batch_size):
        prompt = range(1000 + index, 1000 + index + NUM_PROMPT_TOKENS)
        engine.add(EngineRequest(str(index), prompt, params))
    began = time.thread_time()
    engine.step()
    return time.thread_time() - began


def empty(engine: Engine) -> float:
    """The seconds that aborting all sequences takes, as at the end of a burst."""
    seq_ids = engine.running_seq_ids
    began = time.thread_time()
    for seq_id in seq_ids:
        engine.abort(seq_id)
    return time.thread_time() - began


def decode(engine: Engine) -> float:
    """The median seconds of a step in which every sequence gets one token."""
    times = []
    for _ in range(NUM_STEPS):
        began = time.thread_time()
        engine.step()
        times.append(time.thread_time() - began)
    return sorted(times)[len(times) // 2]


def parts_of_a_step(engine: Engine) -> dict[str, float]:
    """Seconds per step of each part.

    They include the measuring, so a part that is called often reads a little high.
    """
    clock, pack, sample = Clock(), ingine.engine.run.model_runner.pack, ingine.engine.run.model_runner.sample
    clock.watch(engine._scheduler, "schedule", "schedule")
    clock.watch(ingine.engine.run.model_runner, "pack", "pack")
    clock.watch(ingine.engine.run.model_runner, "sample", "sample")
    clock.watch(engine._scheduler, "advance", "advance")
    clock.watch(engine._scheduler, "settle", "settle")
    clock.watch(engine._appender, "append", "append, text, output")
    for _ in range(NUM_STEPS):
        engine.step()
    ingine.engine.run.model_runner.pack, ingine.engine.run.model_runner.sample = pack, sample
    return {part: seconds / NUM_STEPS for part, seconds in clock.seconds.items()}


def measure(batch_size: int, params: SamplingParams, model: StandInDecoder, tokenizer: Tokenizer) -> str:
    """One row of figures: the best of `NUM_ROUNDS`, since other work on the machine can only add time."""
    rounds = []
    for _ in range(NUM_ROUNDS):
        engine = make_engine(batch_size, model, tokenizer)
        admission, step, end = fill(engine, batch_size, params), decode(engine), empty(engine)
        fill(engine, batch_size, params)
        parts = parts_of_a_step(engine)
        rounds.append({"step": step, **parts, "admission": admission, "end": end})
    best = {name: min(figures[name] for figures in rounds) for name in rounds[0]}
    return " | ".join(f"{1e3 * seconds:.2f}" for seconds in best.values())


def profile(batch_size: int, params: SamplingParams, model: StandInDecoder, tokenizer: Tokenizer) -> None:
    engine = make_engine(batch_size, model, tokenizer)
    fill(engine, batch_size, params)
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(NUM_STEPS):
        engine.step()
    profiler.disable()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", action="store_true", help="cProfile's table of the largest batch")
    args = parser.parse_args()
    path = resolve_model(DEFAULT_MODEL)
    model = StandInDecoder(ModelConfig.from_folder(path))
    tokenizer = Tokenizer.from_folder(path)
    if args.profile:
        profile(BATCH_SIZES[-1], KINDS["greedy"], model, tokenizer)
        return
    parts = "schedule | pack | sample | advance | settle | append, text, output"
    print(f"ms a step | whole | {parts} | admission | end")
    for name, params in KINDS.items():
        for batch_size in BATCH_SIZES:
            print(f"{batch_size} seqs, {name} | {measure(batch_size, params, model, tokenizer)}")


if __name__ == "__main__":
    main()
