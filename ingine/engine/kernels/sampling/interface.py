"""The interface by which tokens are chosen and log probabilities computed, and the torch reference."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ingine.engine.kernels.sampling import reference as random_sampling
from ingine.engine.kernels.sampling.logprobs import logprobs
from ingine.engine.kernels.sampling.masks import mask
from ingine.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class Sampling:
    name: str
    choose: Callable[[Tensor, list[SamplingParams], np.ndarray], Tensor]
    """A function like `ingine.engine.kernels.sampling.reference.choose`, which defines it."""
    logprobs: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor, Tensor]]
    """A function like `ingine.engine.kernels.sampling.logprobs.logprobs`, which defines it."""
    mask: Callable[[Tensor, np.ndarray, np.ndarray], None]
    """A function like `ingine.engine.kernels.sampling.masks.mask`, which defines it."""


TORCH_SAMPLING = Sampling("torch", random_sampling.choose, logprobs, mask)
"""The reference, for every device and dtype."""
