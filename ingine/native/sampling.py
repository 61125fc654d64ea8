"""The next token of each row of logits, by `src/sampling.cpp`: what `ingine.random_sampling` defines.

A row is read once or twice, in bfloat16 where it comes so, and only tokens near its largest logit are sorted.
"""

import ctypes
from functools import cache

import numpy as np
import torch
from torch import Tensor

from ingine import native
from ingine.random_sampling import MIN_TEMPERATURE
from ingine.sampling_params import SamplingParams


def supports(logits: Tensor) -> bool:
    return logits.device.type == "cpu" and logits.dtype in native.DTYPES and native.library() is not None


def choose(logits: Tensor, params: list[SamplingParams], uniform: np.ndarray) -> Tensor:
    """[num_rows] int64 token ids, from logits [num_rows, vocab_size] and a number in [0, 1) a row; -1 where
    the largest logit is not finite.

    May differ from `random_sampling.choose` where a number is within rounding, 1e-6, of the edge between two
    tokens. Depends on nothing but the row, its parameters and number, and the kind of CPU.
    """
    logits = logits.contiguous()
    num_rows, vocab_size = logits.shape
    rows = np.array(
        [
            (
                0 if p.greedy else max(p.temperature, MIN_TEMPERATURE),
                p.min_p,
                min(p.top_k, vocab_size),
                p.top_p,
            )
            for p in params
        ],
        dtype=np.float32,
    )
    rows = np.column_stack((rows, uniform))
    token_ids = torch.empty(num_rows, dtype=torch.int64)
    _function()(
        logits.data_ptr(),
        rows.ctypes.data,
        token_ids.data_ptr(),
        num_rows,
        vocab_size,
        native.DTYPES[logits.dtype],
    )
    return token_ids


@cache
def _function() -> ctypes._CFuncPtr:
    function = native.library().ingine_sample
    function.argtypes = 3 * [ctypes.c_void_p] + 2 * [ctypes.c_int64] + [ctypes.c_int32]
    function.restype = None
    return function
