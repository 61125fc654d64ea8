"""Chooses device, dtype, limits of a step and memory for KV where the config leaves them open."""

import logging
import os
import re
from dataclasses import replace
from pathlib import Path

import torch

from ingine.engine.config import EngineConfig
from ingine.engine.kernels import native
from ingine.errors import ConfigError

logger = logging.getLogger(__name__)

_DEVICE = re.compile(r"cpu|mps|cuda(:\d{1,3})?")

HOST_MEMORY_SHARE = 0.25
"""Share of available memory that KV may take: a worker without a GPU shares memory with other processes."""


def select_device(name: str) -> torch.device:
    """Return the device `name`; "auto" is cuda, else mps, else cpu. A GPU becomes the current device of the
    calling thread. Raises ConfigError for a device that this machine does not have.
    """
    device = parse_device(name)
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch is not consistent here
        logger.debug("torch says: %s", error)
        raise ConfigError(f"device {name!r} cannot be used: {_what_there_is()}") from None
    if device.type == "cuda":
        # Kernels and graphs run on the current device, whatever device their tensors are on.
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        torch.cuda.set_device(device)
    return device


def parse_device(name: str) -> torch.device:
    """Return the same device as `select_device`, without using it."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    if _DEVICE.fullmatch(name):
        return torch.device(name)
    raise ConfigError(f"device {name!r} is none of auto, cpu, cuda, cuda:1 and mps: {_what_there_is()}")


def _what_there_is() -> str:
    """Describe, for an error message, the devices of this machine and why others may be missing."""
    names = ["cpu"]
    names += [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    names += ["mps"] * torch.backends.mps.is_available()
    found = f"this machine has {', '.join(names)}"
    if torch.version.cuda is None and torch.version.hip is None:
        found += ". This torch is built without CUDA: for an NVIDIA GPU install another build of it"
    elif len(names) == 1:
        found += ". torch finds no GPU: look at the driver, and at CUDA_VISIBLE_DEVICES"
    return found


def select_dtype(name: str, device: torch.device, checkpoint_dtype: torch.dtype) -> torch.dtype:
    """Return the dtype `name`. "auto" is bfloat16 if the device computes in it, else the fastest safe dtype.

    On a CPU without bfloat16 arithmetic, native kernels expand bfloat16 to float32. A checkpoint in bfloat16
    stays so then, since half as many bytes are read.
    """
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "mps":
        return torch.bfloat16 if torch.backends.mps.is_macos_or_newer(14, 0) else torch.float32
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # not in every supported torch
    has_bf16 = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    keeps_bf16 = checkpoint_dtype == torch.bfloat16 and native.library() is not None
    return torch.bfloat16 if has_bf16 or keeps_bf16 else torch.float32


def resolve_limits(config: EngineConfig, device: torch.device, model_max_len: int) -> EngineConfig:
    """Return `config` with each limit that is None filled in, except for `kv_cache_bytes`."""
    num_seqs, num_tokens = (256, 2048) if device.type == "cuda" else (64, 512)
    if config.max_num_batched_tokens is None:
        num_seqs = config.max_num_seqs or num_seqs
        num_tokens = max(num_tokens, num_seqs)
    else:
        num_tokens = config.max_num_batched_tokens
        num_seqs = config.max_num_seqs or min(num_seqs, num_tokens)
    is_async = config.async_scheduling
    if is_async is None:
        is_async = device.type == "cuda" and config.speculation is None
    if config.max_model_len is not None and config.max_model_len > model_max_len:
        raise ConfigError(
            f"max_model_len ({config.max_model_len}) is over what the model was made for ({model_max_len})"
        )
    return replace(
        config,
        max_num_seqs=num_seqs,
        max_num_batched_tokens=num_tokens,
        max_model_len=config.max_model_len or model_max_len,
        async_scheduling=is_async,
    )


def num_kv_blocks(
    config: EngineConfig,
    device: torch.device,
    bytes_per_block: int,
    *,
    step_bytes: int = 0,
    mapped_bytes: int = 0,
) -> int:
    """Return how many KV blocks fit into `kv_cache_bytes` or, if that is None, into the memory that the
    device has left.

    In the second case the weights are loaded already, except for `mapped_bytes`; `step_bytes` are kept free
    for a step, and the result is at most what `max_num_seqs` sequences of `max_model_len` tokens can use.
    Raises ConfigError if there is no room for two tokens. `config` is from `resolve_limits`.
    """
    if config.kv_cache_bytes is not None:
        budget = config.kv_cache_bytes
    else:
        useful = config.max_num_seqs * -(-config.max_model_len // config.block_size)
        spare = _spare_bytes(device, config.gpu_memory_utilization, mapped_bytes)
        budget = min(spare - step_bytes, useful * bytes_per_block)
    num_blocks = budget // bytes_per_block
    if num_blocks * config.block_size < 2:
        raise ConfigError(
            f"no room for KV: {max(budget, 0)} bytes, where a block of {config.block_size} tokens takes "
            f"{bytes_per_block}; raise kv_cache_bytes or gpu_memory_utilization, or lower "
            f"max_num_batched_tokens or max_num_seqs"
        )
    logger.info(
        "KV: %d blocks of %d tokens, %.2f GiB",
        num_blocks,
        config.block_size,
        num_blocks * bytes_per_block / 2**30,
    )
    return num_blocks


def _spare_bytes(device: torch.device, gpu_memory_utilization: float, mapped_bytes: int) -> int:
    if device.type != "cuda":
        # Pages of mapped weights count as available, but KV in their place would make each step read them
        # again.
        return int(max(0, available_host_bytes() - mapped_bytes) * HOST_MEMORY_SHARE)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return max(0, int(free - total * (1 - gpu_memory_utilization)))


def available_host_bytes(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the bytes that can be allocated without swapping, within a container's limit."""
    try:
        meminfo = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        available = int(meminfo["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):  # not Linux: half of what the machine has
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    try:
        limit = int((cgroup / "memory.max").read_text())
        used = int((cgroup / "memory.current").read_text())
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        # Pages of files, such as the weights just read, count as used, but are dropped when memory is needed.
        used -= int(stat["inactive_file"]) + int(stat["active_file"])
    except (OSError, ValueError, KeyError):  # no cgroup v2, or its limit is "max"
        return available
    return min(available, max(0, limit - used))
