"""How much memory a step takes besides weights and KV: found out by running the largest one."""

import torch

from ingine.config import EngineConfig
from ingine.model_runner import ModelRunner
from ingine.models import Decoder
from ingine.parallel import TensorParallel
from ingine.sampling_params import MAX_LOGPROBS, SamplingParams
from ingine.scheduler import ScheduledBatch
from ingine.sequence import Sequence

COSTLY = SamplingParams(
    temperature=1.0, top_p=0.9, repetition_penalty=1.1, frequency_penalty=0.1, logprobs=MAX_LOGPROBS, seed=0
)
"""What keeps the most copies of the logits."""


def largest_step_bytes(config: EngineConfig, model: Decoder, parallel: TensorParallel) -> int:
    """Bytes of a CUDA device that the largest step of `config` takes at its peak.

    0 elsewhere: there memory for KV is a share of what is available, which leaves room.
    """
    if model.device.type != "cuda":
        return 0
    torch.cuda.synchronize(model.device)
    torch.cuda.reset_peak_memory_stats(model.device)
    before = torch.cuda.memory_allocated(model.device)
    run_largest_step(config, model, parallel)
    torch.cuda.synchronize(model.device)
    return torch.cuda.max_memory_allocated(model.device) - before


def run_largest_step(config: EngineConfig, model: Decoder, parallel: TensorParallel) -> None:
    """`max_num_batched_tokens` tokens, of as many sequences as may be, each with the costliest sampling.

    In a KV cache of its own, which is gone afterwards.
    """
    block_size = config.block_size
    batch, num_blocks = ScheduledBatch(), 0
    for seq in _sequences(config):
        needed = -(-seq.num_tokens // block_size)
        seq.block_table.extend(range(num_blocks, num_blocks + needed))
        num_blocks += needed
        batch.add(seq, seq.num_tokens)
    kv_caches = model.allocate_kv_caches(num_blocks, block_size)
    tokens = torch.empty(config.max_num_batched_tokens, dtype=torch.int64, device=model.device)
    runner = ModelRunner(model, kv_caches, block_size, tokens=tokens, parallel=parallel)
    if parallel.rank == 0:
        runner.run(batch).wait()
        parallel.send(None)
    else:
        runner.follow()


def _sequences(config: EngineConfig) -> list[Sequence]:
    """`max_num_seqs` of them, together of `max_num_batched_tokens` tokens, the first as long as may be."""
    num_left, sequences = config.max_num_batched_tokens, []
    for index in range(config.max_num_seqs):
        num_others = config.max_num_seqs - index - 1
        num_tokens = max(1, min(num_left - num_others, config.max_model_len - 1))
        num_left -= num_tokens
        sequences.append(
            Sequence(
                str(index),
                [0] * num_tokens,
                COSTLY,
                seed=0,
                sort_key=(0.0, index),
                max_num_tokens=config.max_model_len,
            )
        )
    return sequences
