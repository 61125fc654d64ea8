"""Chooses the kernels that compute a model on one device, once, by what the machine has."""

import logging
import os
import shutil
import sysconfig
from ctypes import CDLL
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import torch

from ingine.engine.kernels import native
from ingine.engine.kernels.attention import AttentionBackend, NativeAttention, TorchAttention
from ingine.engine.kernels.attention.native import KV_FORMATS, MAX_HEAD_DIM
from ingine.engine.kernels.layers.int4_weights import Int4Weights
from ingine.engine.kernels.layers.onednn import (
    PackedBfloat16,
    PackedInt8,
    bfloat16_is_packable,
    int8_is_packable,
    int8_obstacle,
)
from ingine.engine.kernels.layers.ops import LayerOps, TorchOps
from ingine.engine.kernels.layers.weights import PlainWeights, WeightFormat
from ingine.engine.kernels.native.compiler import BuildError, code_folder
from ingine.engine.kernels.native.layer_ops import NativeOps
from ingine.engine.kernels.native.sampling import NATIVE_SAMPLING
from ingine.engine.kernels.native.weights import NativeInt8, NativeWeights
from ingine.engine.kernels.sampling.cuda import TRITON_SAMPLING
from ingine.engine.kernels.sampling.interface import TORCH_SAMPLING, Sampling
from ingine.errors import ConfigError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Kernels:
    attention: AttentionBackend
    ops: LayerOps
    weights: WeightFormat
    sampling: Sampling


REFERENCE = Kernels(TorchAttention(), TorchOps(), PlainWeights(), TORCH_SAMPLING)
"""The references in plain torch: slow and correct, for every device and dtype."""


def select_kernels(
    device: torch.device,
    dtype: torch.dtype,
    *,
    head_dim: int | None = None,
    kv_cache_dtype: str = "auto",
    quantization: str | None = None,
    block_size: int | None = None,
) -> Kernels:
    """Return the fastest kernels of this machine for `device`, `dtype`, heads of `head_dim` dimensions and KV
    blocks of `block_size` tokens. None stands for a size that every backend takes.

    Raises ConfigError for a `kv_cache_dtype` or `quantization` (see `EngineConfig`) that is not available
    here.
    """
    library = native.library_for(device, dtype)
    weights = _select_weights(library, device, dtype, quantization)
    note = ""
    if device.type != "cuda":
        attention = _select_attention(library, device, dtype, head_dim, kv_cache_dtype)
        ops, sampling = TorchOps(), TORCH_SAMPLING
        if library is not None:
            ops, sampling = NativeOps(library), NATIVE_SAMPLING
        kernels = Kernels(attention, ops, weights, sampling)
    elif (obstacle := _triton_obstacle(device, head_dim)) is None:
        kernels = _select_cuda_kernels(device, dtype, head_dim, kv_cache_dtype, block_size)
    elif kv_cache_dtype == "auto":
        kernels, note = REFERENCE, f", since there are no Triton kernels: {obstacle}"
    else:
        raise ConfigError(f"kv_cache_dtype {kv_cache_dtype!r} needs Triton kernels on CUDA: {obstacle}")
    logger.info(
        "kernels on %s, %s: attention %s, layer operations %s, weights %s, sampling %s%s",
        device,
        str(dtype).removeprefix("torch."),
        kernels.attention.name,
        kernels.ops.name,
        kernels.weights.name,
        kernels.sampling.name,
        note,
    )
    return kernels


def triton_kernels(kv_cache_dtype: str = "auto") -> Kernels:
    """Return the kernels for CUDA. With TRITON_INTERPRET=1 in the environment they run on the CPU."""
    # Not at the top: a worker without a GPU needs no triton.
    from ingine.engine.kernels.attention.triton import TritonAttention
    from ingine.engine.kernels.layers.triton_ops import TritonOps
    from ingine.engine.kernels.layers.triton_weights import TritonWeights

    return Kernels(TritonAttention(kv_cache_dtype), TritonOps(), TritonWeights(), TRITON_SAMPLING)


def _triton_obstacle(device: torch.device, head_dim: int | None) -> str | None:
    """Return why Triton kernels are not available on this GPU, or None if they are."""
    if find_spec("triton") is None:
        return "triton is not installed"
    if (capability := torch.cuda.get_device_capability(device)) < (8, 0):
        return f"compute capability {capability[0]}.{capability[1]} is under 8.0"
    if (obstacle := _launcher_obstacle() or _cache_obstacle()) is not None:
        return obstacle
    from ingine.engine.kernels.attention.triton import TritonAttention

    if head_dim is not None and not TritonAttention.supports(head_dim):
        return f"head_dim {head_dim} is over what they take"
    return None


def _launcher_obstacle() -> str | None:
    """Return why triton cannot compile the C code that launches kernels (`triton.runtime.build`), or None."""
    compiler = os.environ.get("CC")
    if compiler is None and not (shutil.which("gcc") or shutil.which("clang")):
        return "triton finds no C compiler (CC, gcc or clang), which launches kernels"
    if compiler is not None and shutil.which(compiler) is None:
        return f"triton finds no C compiler, which launches kernels: CC is {compiler!r}"
    scheme = sysconfig.get_default_scheme()
    include = sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)["include"]
    if not Path(include, "Python.h").exists():
        return f"what launches kernels is C code that includes Python.h, which is not in {include}"
    return None


def _cache_obstacle() -> str | None:
    """Give triton another folder for compiled code if another user can write to its own: triton loads what is
    there, whoever wrote it. Returns why neither folder is safe, or None if one is.
    """
    home = os.environ.get("TRITON_HOME") or os.path.expanduser("~")
    chosen = os.environ.get("TRITON_CACHE_DIR") or os.path.join(home, ".triton", "cache")
    try:
        os.environ["TRITON_CACHE_DIR"] = str(code_folder(Path(chosen), "TRITON_CACHE_DIR"))
    except BuildError as error:
        return str(error)
    return None


def _select_cuda_kernels(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int | None,
    kv_cache_dtype: str,
    block_size: int | None,
) -> Kernels:
    from ingine.engine.kernels.attention.varlen import VarlenAttention, find_varlen_attn

    if kv_cache_dtype == "fp8" and (capability := torch.cuda.get_device_capability(device)) < (8, 9):
        raise ConfigError(
            f"kv_cache_dtype 'fp8' needs compute capability 8.9 or above, this is {capability[0]}."
            f"{capability[1]}: 'int8' takes as little memory"
        )
    kernels = triton_kernels(kv_cache_dtype)
    # Which of the two is faster has not been measured. Blocks of a size that torch's attention takes are read
    # as a request for it: they have no other use, since sequences share and waste whole blocks.
    if (
        kv_cache_dtype == "auto"
        and head_dim is not None
        and block_size is not None
        and VarlenAttention.supports(dtype, head_dim, block_size)
        and (varlen_attn := find_varlen_attn()) is not None
    ):
        return replace(kernels, attention=VarlenAttention(varlen_attn))
    return kernels


def _select_weights(
    library: CDLL | None, device: torch.device, dtype: torch.dtype, quantization: str | None
) -> WeightFormat:
    """Choose the weight format. `library` is None if it does not compute `dtype` on `device`."""
    if quantization is not None and library is not None:
        int8 = NativeInt8(library, dtype, PackedInt8() if int8_is_packable() else PlainWeights())
        if quantization == "int8":
            return int8
        return Int4Weights(int8, probe=NativeWeights(library, dtype, fallback=PlainWeights()))
    if quantization == "int4":
        raise ConfigError(
            "quantization 'int4' needs device cpu, dtype float32 or bfloat16, and native kernels (a C++ "
            f"compiler); this is {device}, {dtype}"
        )
    if quantization == "int8":
        obstacle = f"this is {device}" if device.type != "cpu" else int8_obstacle()
        if obstacle is not None:
            raise ConfigError(
                "quantization 'int8' needs device cpu and, there, native kernels (a C++ compiler) with dtype "
                f"float32 or bfloat16, or else an x86 CPU with VNNI, and oneDNN: {obstacle}"
            )
        return PackedInt8()
    is_packable = device.type == "cpu" and dtype == torch.bfloat16 and bfloat16_is_packable()
    library_format = PackedBfloat16() if is_packable else PlainWeights()
    return library_format if library is None else NativeWeights(library, dtype, fallback=library_format)


def _select_attention(
    library: CDLL | None,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int | None,
    kv_cache_dtype: str,
) -> AttentionBackend:
    fits = head_dim is None or NativeAttention.supports(head_dim)
    if library is not None and fits and kv_cache_dtype in KV_FORMATS:
        return NativeAttention(library, kv_cache_dtype)
    if kv_cache_dtype == "fp8":
        raise ConfigError(f"kv_cache_dtype 'fp8' needs a device cuda, this is {device}")
    if kv_cache_dtype != "auto":
        raise ConfigError(
            f"kv_cache_dtype {kv_cache_dtype!r} needs device cpu, dtype float32 or bfloat16, native kernels "
            f"(a C++ compiler), and an even head_dim of at most {MAX_HEAD_DIM}; this is {device}, {dtype}"
            + ("" if fits else f", head_dim {head_dim}")
        )
    return TorchAttention()
