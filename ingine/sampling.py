"""How tokens are chosen and log probabilities found: one interface, the reference in torch."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ingine import random_sampling
from ingine.logprobs import logprobs
from ingine.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class Sampling:
    name: str
    choose: Callable[[Tensor, list[SamplingParams], np.ndarray], Tensor]
    """What `ingine.random_sampling.choose` defines."""
    logprobs: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor]]
    """What `ingine.logprobs.logprobs` defines."""


TORCH_SAMPLING = Sampling("torch", random_sampling.choose, logprobs)
"""The reference, for every device and dtype."""
