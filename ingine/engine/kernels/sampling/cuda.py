"""Sampling on a GPU without sorting the vocabulary or waiting for the device, as a CUDA graph needs.

The parameters of a row are a row of numbers that `pack_params` makes on the host: the same kernels serve
greedy and random rows and all cuts. The definition, which the tests compare with, is
`kernels.sampling.reference`: a row gives the token that `choose` there gives, unless rounding decides between
two tokens.

torch selects the `NUM_CANDIDATES` largest logits of each row. If these include all tokens that top_k, top_p
and min_p leave, the row is read once or twice more. If not, a radix descent over the bits of the logits finds
first where to cut and then the token. A row without cuts is drawn by the CDF in the order of the ids.
Everything except the selection is one launch, with one program for each row.

This has not been timed on a GPU. A flat row that needs the descent is the first case to measure: one program
reads the whole vocabulary up to nine times for each cut and for the draw.
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
"""Number of parameters of a row."""

NUM_CANDIDATES = 1024

BLOCK = 8192
"""Number of logits that a program loads at a time."""

MASK_BLOCK = 4096
"""Logits that a program masks."""

NUM_DIGITS = {torch.bfloat16: 4, torch.float16: 5, torch.float32: 8}
"""Number of digits of four bits that distinguish all logits of a dtype as float32. The lowest 16 bits of a
bfloat16 are 0 in float32, and the lowest 13 of a float16."""


def pack_params(params: list[SamplingParams], uniform: np.ndarray) -> np.ndarray:
    """Return [num_rows, 5] float32 on the host: temperature (0 is greedy), top_k (0 keeps all), top_p, min_p,
    and the row's number of `uniform` [num_rows], in [0, 1).
    """
    rows = [
        (divisor_of(p), max(p.top_k, 0), p.top_p, p.min_p, number)
        for p, number in zip(params, uniform.tolist(), strict=True)
    ]
    return np.array(rows, dtype=np.float32).reshape(-1, NUM_PARAMS)


def greedy(logits: Tensor) -> Tensor:
    """Return [num_rows] int64: the likeliest token of each row of logits [num_rows, vocab_size], the lowest
    id among equal logits; -1 where the largest logit is not finite.
    """
    values, token_ids = logits.max(dim=-1)  # propagates NaN, and takes the first of equal logits
    return token_ids.masked_fill_(values - values != 0, -1)  # inf - inf and NaN - NaN are NaN


def choose(logits: Tensor, rows: Tensor) -> Tensor:
    """Return [num_rows] int64: a token for each row of logits [num_rows, vocab_size], whose rows may be
    strided; -1 where the largest logit is not finite. `rows` is the result of `pack_params` on the device.

    For CUDA tensors in float32, bfloat16 and float16. A row's token depends only on that row.
    """
    # Not at the top: a worker without a GPU needs no triton.
    from ingine.engine.kernels.triton.sampling import choose_kernel

    num_rows, vocab_size = logits.shape
    num_candidates = min(NUM_CANDIDATES, vocab_size)
    candidates = logits.topk(num_candidates).values  # sorts NaN first
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


def mask(logits: Tensor, rows: np.ndarray, masks: np.ndarray) -> None:
    """Do what `kernels.sampling.masks.mask` does, for contiguous logits, in one launch."""
    from ingine.engine.kernels.triton.mask import mask_kernel

    vocab_size, device = logits.shape[1], logits.device
    mask_kernel[(len(masks), -(-vocab_size // MASK_BLOCK))](
        logits,
        to_device(rows, device),
        to_device(masks, device),
        logits.stride(0),
        vocab_size,
        masks.shape[1],
        BLOCK=MASK_BLOCK,
    )


TRITON_SAMPLING = Sampling("triton", _choose_for, logprobs, mask)
"""Sampling for the dtypes in `NUM_DIGITS` that does not wait for the device."""
