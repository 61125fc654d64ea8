"""What computes a model on one device, chosen once by what the machine has."""

import logging
from ctypes import CDLL
from dataclasses import dataclass

import torch

from ingine import native
from ingine.attention import AttentionBackend, NativeAttention, TorchAttention
from ingine.attention.native import MAX_HEAD_DIM
from ingine.errors import ConfigError
from ingine.layers.onednn import PackedBfloat16, PackedInt8, bfloat16_is_packable, int8_obstacle
from ingine.layers.ops import LayerOps, TorchOps
from ingine.layers.weights import PlainWeights, WeightFormat
from ingine.native.layer_ops import NativeOps
from ingine.native.weights import NativeBfloat16, NativeInt8, is_supported

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Kernels:
    attention: AttentionBackend
    ops: LayerOps
    weights: WeightFormat


REFERENCE = Kernels(TorchAttention(), TorchOps(), PlainWeights())
"""Plain torch: slow, right, for every device and dtype."""


def select_kernels(
    device: torch.device,
    dtype: torch.dtype,
    *,
    head_dim: int | None = None,
    kv_cache_dtype: str = "auto",
    quantization: str | None = None,
) -> Kernels:
    """The fastest that this machine has for `device`, `dtype` and heads of `head_dim` dimensions; None is one
    that every backend takes.

    Raises ConfigError for a `kv_cache_dtype` or `quantization` (see `EngineConfig`) that it cannot have.
    """
    library = native.library_for(device, dtype)
    kernels = Kernels(
        attention=_select_attention(library, device, dtype, head_dim, kv_cache_dtype),
        ops=TorchOps() if library is None else NativeOps(library),
        weights=_select_weights(library, device, dtype, quantization),
    )
    logger.info(
        "kernels on %s, %s: attention %s, layer operations %s, weights %s",
        device,
        str(dtype).removeprefix("torch."),
        kernels.attention.name,
        kernels.ops.name,
        kernels.weights.name,
    )
    return kernels


def _select_weights(
    library: CDLL | None, device: torch.device, dtype: torch.dtype, quantization: str | None
) -> WeightFormat:
    if quantization == "int8":
        obstacle = f"this is {device}" if device.type != "cpu" else int8_obstacle()
        if obstacle is not None:
            raise ConfigError(f"quantization 'int8' needs an x86 CPU with VNNI, and oneDNN: {obstacle}")
        library_format, own_format = PackedInt8(), NativeInt8
    elif device.type == "cpu" and dtype == torch.bfloat16 and bfloat16_is_packable():
        library_format, own_format = PackedBfloat16(), NativeBfloat16
    else:
        return PlainWeights()
    if dtype == torch.bfloat16 and library is not None and is_supported(library):
        return own_format(library, fallback=library_format)
    return library_format


def _select_attention(
    library: CDLL | None,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int | None,
    kv_cache_dtype: str,
) -> AttentionBackend:
    fits = head_dim is None or NativeAttention.supports(head_dim)
    if library is not None and fits:
        return NativeAttention(library, kv_cache_dtype)
    if kv_cache_dtype != "auto":
        raise ConfigError(
            f"kv_cache_dtype {kv_cache_dtype!r} needs device cpu, dtype float32 or bfloat16, native kernels "
            f"(a C++ compiler), and an even head_dim of at most {MAX_HEAD_DIM}; this is {device}, {dtype}"
            + ("" if fits else f", head_dim {head_dim}")
        )
    return TorchAttention()
