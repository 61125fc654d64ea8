"""What computes a model on one device, chosen once by what the machine has."""

import logging
from dataclasses import dataclass, replace

import torch

from ingine import native
from ingine.attention import AttentionBackend, NativeAttention, TorchAttention
from ingine.errors import ConfigError
from ingine.layers.onednn import PackedBfloat16, PackedInt8, bfloat16_is_packable, int8_is_packable
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
    kv_cache_dtype: str = "auto",
    quantization: str | None = None,
) -> Kernels:
    """The fastest that this machine has for `device` and `dtype`.

    Raises ConfigError for a `kv_cache_dtype` or `quantization` (see `EngineConfig`) that it cannot have.
    """
    kernels = replace(
        REFERENCE,
        attention=_select_attention(device, dtype, kv_cache_dtype),
        ops=_select_ops(device, dtype),
        weights=_select_weights(device, dtype, quantization),
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


def _select_weights(device: torch.device, dtype: torch.dtype, quantization: str | None) -> WeightFormat:
    if quantization == "int8":
        if device.type != "cpu" or not int8_is_packable():
            raise ConfigError(f"quantization 'int8' needs an x86 CPU with VNNI; this is {device}")
        library_format, own_format = PackedInt8(), NativeInt8
    elif device.type == "cpu" and dtype == torch.bfloat16 and bfloat16_is_packable():
        library_format, own_format = PackedBfloat16(), NativeBfloat16
    else:
        return PlainWeights()
    if dtype == torch.bfloat16 and (library := native.library()) is not None and is_supported(library):
        return own_format(library, fallback=library_format)
    return library_format


def _select_attention(device: torch.device, dtype: torch.dtype, kv_cache_dtype: str) -> AttentionBackend:
    if device.type == "cpu" and dtype in native.DTYPES and (library := native.library()) is not None:
        return NativeAttention(library, kv_cache_dtype)
    if kv_cache_dtype != "auto":
        raise ConfigError(
            f"kv_cache_dtype {kv_cache_dtype!r} needs device cpu, dtype float32 or bfloat16, and native "
            f"kernels (a C++ compiler); this is {device}, {dtype}"
        )
    return TorchAttention()


def _select_ops(device: torch.device, dtype: torch.dtype) -> LayerOps:
    if device.type == "cpu" and dtype in native.DTYPES and (library := native.library()) is not None:
        return NativeOps(library)
    return TorchOps()
