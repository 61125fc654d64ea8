"""What computes a model on one device, chosen once by what the machine has."""

import logging
from dataclasses import dataclass, replace

import torch

from ingine.attention import AttentionBackend, TorchAttention
from ingine.layers.onednn import PackedBfloat16, bfloat16_is_packable
from ingine.layers.ops import LayerOps, TorchOps
from ingine.layers.weights import PlainWeights, WeightFormat

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Kernels:
    attention: AttentionBackend
    ops: LayerOps
    weights: WeightFormat


REFERENCE = Kernels(TorchAttention(), TorchOps(), PlainWeights())
"""Plain torch: slow, right, for every device and dtype."""


def select_kernels(device: torch.device, dtype: torch.dtype) -> Kernels:
    """The fastest that this machine has for `device` and `dtype`."""
    kernels = replace(REFERENCE, weights=_select_weights(device, dtype))
    logger.info(
        "kernels on %s, %s: attention %s, layer operations %s, weights %s",
        device,
        str(dtype).removeprefix("torch."),
        kernels.attention.name,
        kernels.ops.name,
        kernels.weights.name,
    )
    return kernels


def _select_weights(device: torch.device, dtype: torch.dtype) -> WeightFormat:
    if device.type == "cpu" and dtype == torch.bfloat16 and bfloat16_is_packable():
        return PackedBfloat16()
    return PlainWeights()
