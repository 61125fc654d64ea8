"""Steps before the first one that counts: they compile kernels, and tell what memory a step takes."""

import torch

from ingine.config import EngineConfig
from ingine.model_runner import ModelRunner
from ingine.models import Decoder
from ingine.parallel import TensorParallel
from ingine.sampling_params import MAX_LOGPROBS, SamplingParams
from ingine.scheduler import ScheduledBatch
from ingine.sequence import Sequence

PROMPT_LENGTHS = (2, 4, 8, 16, 32, 64, 128)
"""Prefill kernels come in a few sizes, compiled when first used: seconds that no request should wait."""

COSTLY = SamplingParams(
    temperature=1.0, top_p=0.9, repetition_penalty=1.1, frequency_penalty=0.1, logprobs=MAX_LOGPROBS, seed=0
)
"""What keeps the most copies of the logits."""


def warm_up(config: EngineConfig, model: Decoder, parallel: TensorParallel) -> int:
    """Returns the bytes that the largest step of `config` takes at its peak besides weights and KV.

    On CUDA. Elsewhere there is nothing to compile, and memory for KV is a share of what is available, which
    leaves room: this returns 0 at once.
    """
    if model.device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(model.device)
    before = torch.cuda.memory_allocated(model.device)
    run_steps(config, model, parallel)
    torch.cuda.synchronize(model.device)
    return torch.cuda.max_memory_allocated(model.device) - before


def run_steps(config: EngineConfig, model: Decoder, parallel: TensorParallel) -> None:
    """Prompts of some lengths, then a step of as many tokens and sequences as may be, with costly sampling.

    In a KV cache of its own, which is gone afterwards.
    """
    most = config.max_num_batched_tokens
    longest = min(most, config.max_model_len - 1)
    steps = [_step(config, [length]) for length in PROMPT_LENGTHS if length <= longest]
    steps.append(_step(config, _largest_lengths(config)))
    num_blocks = max(max(seq.block_table) for seq in steps[-1].seqs) + 1
    kv_caches = model.allocate_kv_caches(num_blocks, config.block_size)
    tokens = torch.empty(most, dtype=torch.int64, device=model.device)
    runner = ModelRunner(model, kv_caches, config.block_size, tokens=tokens, parallel=parallel)
    if parallel.rank > 0:
        runner.follow()
        return
    for step in steps:
        runner.run(step).wait()
    parallel.send(None)


def _largest_lengths(config: EngineConfig) -> list[int]:
    """Of `max_num_seqs` sequences, `max_num_batched_tokens` together, the first as long as may be."""
    num_left, lengths = config.max_num_batched_tokens, []
    for num_others in reversed(range(config.max_num_seqs)):
        lengths.append(max(1, min(num_left - num_others, config.max_model_len - 1)))
        num_left -= lengths[-1]
    return lengths


def _step(config: EngineConfig, lengths: list[int]) -> ScheduledBatch:
    batch, num_blocks = ScheduledBatch(), 0
    for index, length in enumerate(lengths):
        seq = Sequence(
            str(index),
            [0] * length,
            COSTLY,
            seed=0,
            sort_key=(0.0, index),
            max_num_tokens=config.max_model_len,
        )
        needed = -(-length // config.block_size)
        seq.block_table.extend(range(num_blocks, num_blocks + needed))
        num_blocks += needed
        batch.add(seq, length)
    return batch
