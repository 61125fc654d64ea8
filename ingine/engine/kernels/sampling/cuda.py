"""Sampling on a GPU: without a sort of the vocabulary, without waiting for the device, and so that a CUDA
graph can hold it.

What a row asks for is a row of numbers, made on the host by `pack_params`: the same kernels serve greedy and
random rows and all cuts. The definition, which the tests compare with, is `kernels.sampling.reference`: a row
gives the token that `choose` there gives, unless rounding decides between two tokens.

torch selects the `NUM_CANDIDATES` largest logits of each row. Where all that may be drawn is among them, as
with a top_k of no more than that, and where they hold all that a top_p or min_p leaves, the row is read once
or twice more. Where it is not, a radix descent over the bits of the logits finds first where to cut and then
the token. A row that cuts nothing is drawn from by the CDF in the order of the ids. All but the selection is
one launch, of one program a row.

Nothing of it has been timed on a GPU. The first thing to look at is a flat row that needs the descent: one
program reads the whole vocabulary up to nine times for each cut and for the draw.
"""

import numpy as np
import torch
from torch import Tensor

from ingine.engine.communication.transfer import to_device
from ingine.engine.kernels.sampling.interface import Sampling
from ingine.engine.kernels.sampling.logprobs import logprobs
from ingine.engine.kernels.sampling.reference import divisor_of
from ingine.sampling_params import SamplingParams

NUM_PARAMS = 5
"""Numbers that say how a row is sampled."""

NUM_CANDIDATES = 1024

BLOCK = 8192
"""Logits that a program has in flight at a time."""

NUM_DIGITS = {torch.bfloat16: 4, torch.float16: 5, torch.float32: 8}
"""Of four bits: what tells a logit, as a float32, from all others. The lowest 16 bits of a bfloat16 are 0
there, and the lowest 13 of a float16."""


def pack_params(params: list[SamplingParams], uniform: np.ndarray) -> np.ndarray:
    """[num_rows, 5] float32, on the host: temperature (0 is greedy), top_k (0 keeps all), top_p, min_p, and
    the row's number of `uniform` [num_rows], in [0, 1)."""
    rows = [
        (divisor_of(p), max(p.top_k, 0), p.top_p, p.min_p, number)
        for p, number in zip(params, uniform.tolist(), strict=True)
    ]
    return np.array(rows, dtype=np.float32).reshape(-1, NUM_PARAMS)


def greedy(logits: Tensor) -> Tensor:
    """[num_rows] int64: the likeliest token of each row of logits [num_rows, vocab_size], the lowest id of
    those that are alike; -1 where the largest logit is not finite."""
    values, token_ids = logits.max(dim=-1)  # which propagates NaN, and takes the first
    return token_ids.masked_fill_(values - values != 0, -1)  # inf - inf and NaN - NaN are NaN


def choose(logits: Tensor, rows: Tensor) -> Tensor:
    """[num_rows] int64: a token for each row of logits [num_rows, vocab_size], whose rows may be strided; -1
    where the largest logit is not finite. `rows` is what `pack_params` made, on the device.

    For CUDA tensors in float32, bfloat16 and float16. What a row gives depends on nothing but that row.
    """
    # Not at the top: a worker without a GPU needs no triton.
    from ingine.engine.kernels.triton.sampling import choose_kernel

    num_rows, vocab_size = logits.shape
    num_candidates = min(NUM_CANDIDATES, vocab_size)
    candidates = logits.topk(num_candidates).values  # which has NaN first
    token_ids = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    choose_kernel[(num_rows,)](
        logits,
        candidates,
        rows,
        token_ids,
        logits.stride(0),
        vocab_size,
        num_candidates,
        CANDIDATES_BLOCK=1 << (num_candidates - 1).bit_length(),  # the next power of two
        BLOCK=BLOCK,
        NUM_DIGITS=NUM_DIGITS[logits.dtype],
        num_warps=16,
    )
    return token_ids


def _choose_for(logits: Tensor, params: list[SamplingParams], uniform: np.ndarray) -> Tensor:
    if all(p.greedy for p in params):
        return greedy(logits)
    return choose(logits, to_device(pack_params(params, uniform), logits.device))


TRITON_SAMPLING = Sampling("triton", _choose_for, logprobs)
"""For the dtypes in `NUM_DIGITS`. Waits for nothing on the device."""
