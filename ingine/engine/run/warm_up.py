"""Runs steps before the first request, to compile kernels and to measure the memory of a step."""

import torch

from ingine.engine.communication.parallel import TensorParallel
from ingine.engine.config import EngineConfig
from ingine.engine.kernels.attention import KVCache
from ingine.engine.models.interface import Model
from ingine.engine.request import EngineRequest
from ingine.engine.run.model_runner import ModelRunner
from ingine.engine.schedule.scheduler import ScheduledBatch
from ingine.engine.schedule.sequence import Sequence
from ingine.errors import ConfigError
from ingine.sampling_params import MAX_LOGPROBS, SamplingParams

PROMPT_LENGTHS = (2, 4, 8, 16, 32, 64, 128)
"""Prefill kernels exist in a few sizes, each compiled at first use. That takes seconds, for which no request
should wait."""

COSTLY = SamplingParams(
    temperature=1.0, top_p=0.9, repetition_penalty=1.1, frequency_penalty=0.1, logprobs=MAX_LOGPROBS, seed=0
)
"""The parameters whose sampling keeps the most copies of the logits."""


def warm_up(config: EngineConfig, model: Model, parallel: TensorParallel) -> int:
    """Run the warm-up steps. Returns the peak bytes of the largest step of `config`, without weights and KV.

    Raises ConfigError if the largest step does not fit into memory. On devices other than CUDA this does
    nothing and returns 0: there is nothing to compile, and KV takes only a share of the available memory.
    """
    if model.device.type != "cuda":
        return 0
    try:
        return _peak_bytes(config, model, parallel)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"the largest step does not fit beside the weights: lower max_num_batched_tokens "
            f"({config.max_num_batched_tokens}) or max_num_seqs ({config.max_num_seqs}): {error}"
        ) from None


def _peak_bytes(config: EngineConfig, model: Model, parallel: TensorParallel) -> int:
    steps = make_steps(config, model.config.vocab_size)
    kv_caches = allocate_for(steps, config, model)
    torch.cuda.reset_peak_memory_stats(model.device)
    before = torch.cuda.memory_allocated(model.device)
    run_steps(steps, kv_caches, config, model, parallel)
    torch.cuda.synchronize(model.device)
    return torch.cuda.max_memory_allocated(model.device) - before


def make_steps(config: EngineConfig, vocab_size: int) -> list[ScheduledBatch]:
    """Return steps with a prompt of each of some lengths, then the largest step; all with costly sampling."""
    longest = min(config.max_num_batched_tokens, config.max_model_len - 1)
    lengths = [[length] for length in PROMPT_LENGTHS if length <= longest]
    return [_step(config, vocab_size, step) for step in (*lengths, _largest_lengths(config))]


def allocate_for(steps: list[ScheduledBatch], config: EngineConfig, model: Model) -> list[KVCache]:
    """Allocate KV caches for `steps` alone, large enough for the largest of them."""
    num_blocks = max(max(seq.block_table) for seq in steps[-1].seqs) + 1
    return model.allocate_kv_caches(num_blocks, config.block_size)


def run_steps(
    steps: list[ScheduledBatch],
    kv_caches: list[KVCache],
    config: EngineConfig,
    model: Model,
    parallel: TensorParallel,
) -> None:
    tokens = torch.empty(config.max_num_batched_tokens, dtype=torch.int64, device=model.device)
    runner = ModelRunner(model, kv_caches, config.block_size, tokens=tokens, parallel=parallel)
    if parallel.rank > 0:
        runner.follow()
        return
    for step in steps:
        runner.sample(runner.forward(step)).wait()
    parallel.send(None)


def _largest_lengths(config: EngineConfig) -> list[int]:
    """Return the lengths of `max_num_seqs` sequences that have `max_num_batched_tokens` tokens together, the
    first one as long as possible.
    """
    num_left, lengths = config.max_num_batched_tokens, []
    for num_others in reversed(range(config.max_num_seqs)):
        lengths.append(max(1, min(num_left - num_others, config.max_model_len - 1)))
        num_left -= lengths[-1]
    return lengths


def _step(config: EngineConfig, vocab_size: int, lengths: list[int]) -> ScheduledBatch:
    """Return a step of prompts whose tokens are distinct, for which penalties have the most entries."""
    batch, num_blocks = ScheduledBatch(), 0
    for index, length in enumerate(lengths):
        seq = Sequence(
            EngineRequest(str(index), [token % vocab_size for token in range(length)], COSTLY),
            seed=0,
            sort_key=(0.0, index),
            max_num_tokens=config.max_model_len,
        )
        needed = -(-length // config.block_size)
        seq.block_table.extend(range(num_blocks, num_blocks + needed))
        num_blocks += needed
        batch.add(seq, length)
    return batch
