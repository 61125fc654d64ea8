"""Sample tokens and compute log probabilities in C++, as `kernels.sampling` defines them.

A row of logits is read once or twice, in its own dtype (bfloat16 or float32), and only tokens near its
largest logit are sorted.
"""

import ctypes
from functools import cache

import numpy as np
import torch
from torch import Tensor

from ingine.engine.kernels import native
from ingine.engine.kernels.sampling.interface import Sampling
from ingine.engine.kernels.sampling.reference import divisor_of
from ingine.sampling_params import SamplingParams


def choose(logits: Tensor, params: list[SamplingParams], uniform: np.ndarray) -> Tensor:
    """Choose a token for each row of logits [num_rows, vocab_size] with a number in [0, 1) for each row.
    Returns token ids [num_rows] int64, -1 where the largest logit is not finite.

    A token may differ from that of `reference.choose` if the number is within rounding, 1e-6, of the edge
    between two tokens. It depends only on the row, its parameters and number, and the kind of CPU.
    """
    logits = logits.contiguous()
    num_rows, vocab_size = logits.shape
    rows = np.array(
        [
            (divisor_of(p), p.min_p, min(p.top_k, vocab_size), p.top_p, number)
            for p, number in zip(params, uniform.tolist(), strict=True)
        ],
        dtype=np.float32,
    )
    token_ids = torch.empty(num_rows, dtype=torch.int64)
    _library().ingine_sample(
        logits.data_ptr(),
        rows.ctypes.data,
        token_ids.data_ptr(),
        num_rows,
        vocab_size,
        native.DTYPES[logits.dtype],
    )
    return token_ids


def logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what `kernels.sampling.logprobs` defines. Of tokens with equal logits the lowest id comes first.
    Ids of tokens with probability 0, and all ids of a row of NaN, are arbitrary.
    """
    logits = logits.contiguous()
    num_rows, vocab_size = logits.shape
    chosen, ranks = torch.empty(num_rows), torch.empty(num_rows, dtype=torch.int64)
    top_ids = torch.empty((num_rows, num_top), dtype=torch.int64)
    top = torch.empty((num_rows, num_top))
    _library().ingine_logprobs(
        logits.data_ptr(),
        token_ids.data_ptr(),
        chosen.data_ptr(),
        ranks.data_ptr(),
        top_ids.data_ptr(),
        top.data_ptr(),
        num_rows,
        vocab_size,
        num_top,
        native.DTYPES[logits.dtype],
    )
    return chosen, ranks, top_ids, top


def mask(logits: Tensor, rows: np.ndarray, masks: np.ndarray) -> None:
    """Do what `kernels.sampling.masks.mask` does, for contiguous logits."""
    rows, masks = np.ascontiguousarray(rows, dtype=np.int64), np.ascontiguousarray(masks)
    _library().ingine_mask(
        logits.data_ptr(),
        rows.ctypes.data,
        masks.ctypes.data,
        len(masks),
        logits.shape[1],
        masks.shape[1],
        native.DTYPES[logits.dtype],
    )


NATIVE_SAMPLING = Sampling("native", choose, logprobs, mask)
"""Sampling on the CPU for the dtypes in `native.DTYPES`. Needs `native.library`."""


@cache
def _library() -> ctypes.CDLL:
    library = native.library()
    library.ingine_sample.argtypes = 3 * [ctypes.c_void_p] + 2 * [ctypes.c_int64] + [ctypes.c_int32]
    library.ingine_logprobs.argtypes = 6 * [ctypes.c_void_p] + 3 * [ctypes.c_int64] + [ctypes.c_int32]
    library.ingine_mask.argtypes = 3 * [ctypes.c_void_p] + 3 * [ctypes.c_int64] + [ctypes.c_int32]
    library.ingine_mask.restype = None
    library.ingine_sample.restype = library.ingine_logprobs.restype = None
    return library
