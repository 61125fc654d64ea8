"""Who takes part, with which settings, and which workloads each runs how often. README.md says why so."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.rivals.child import ROOT
from benchmarks.rivals.workloads import ARRIVALS, START_COLD, START_WARM, WORKLOADS

NUM_THREADS = os.cpu_count() or 1
MAX_NUM_SEQS = 128
MAX_MODEL_LEN = 2304
"""Holds the longest: 2,000 + 128."""
KV_GIB = 1
"""47,000 tokens in bfloat16; the largest workload has 21,000."""

ADAPTERS = "benchmarks.rivals.systems"
TCMALLOC = "usr/lib/*/libtcmalloc_minimal.so.4"
REFERENCE = "vllm"
"""Arrivals come at a share of this system's capacity."""
LOAD = 0.7

ALWAYS = 99
STARTS = {START_COLD: ALWAYS, START_WARM: ALWAYS}
EVERYTHING = dict.fromkeys([*WORKLOADS, ARRIVALS], ALWAYS) | STARTS
PREFIX_ONLY = {"32-shared": ALWAYS}
BY_STREAMS = dict.fromkeys(["1x41", "8x41", "32x41", "64x41", "128x41"], ALWAYS)
LONG_CONTEXT = dict.fromkeys(["32x41", "32x400", "8x2000"], ALWAYS)
LLAMA_OFTEN = dict.fromkeys(["1x41", "8x41", "32x41", "64x41"], ALWAYS)
LLAMA_SELDOM = {"1x41": ALWAYS, "8x41": 1, "32x41": 1}


@dataclass(frozen=True)
class System:
    name: str
    venv: str
    """Its folder under the repository's root."""
    module: str
    """Answers calls, see `protocol.py`."""
    options: Mapping[str, Any]
    max_rounds: Mapping[str, int]
    """By workload. What is missing here is not run; what is slow runs less often than there are rounds."""
    env: Mapping[str, str] = field(default_factory=dict)


def _ingine(name: str, max_rounds: Mapping[str, int], **options: Any) -> System:
    limits = {"max_num_seqs": MAX_NUM_SEQS, "max_model_len": MAX_MODEL_LEN, "kv_cache_bytes": KV_GIB << 30}
    options = {"enable_prefix_caching": False, **limits, **options}
    return System(name, ".venv", f"{ADAPTERS}.ingine", options, max_rounds)


def _vllm(name: str, max_rounds: Mapping[str, int], **options: Any) -> System:
    limits = {"max_num_seqs": MAX_NUM_SEQS, "max_model_len": MAX_MODEL_LEN}
    env = {
        "OMP_NUM_THREADS": str(NUM_THREADS),
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{NUM_THREADS - 1}",
        "VLLM_CPU_KVCACHE_SPACE": str(KV_GIB),
        # The engine in the process that steps it: on two cores a second one only takes time from it.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # What this keeps from one start to the next cannot be read again on a CPU (0.32.0), and each start
        # compiles anew; with the older cache it does not.
        "VLLM_USE_AOT_COMPILE": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    if tcmalloc := _tcmalloc():
        env["LD_PRELOAD"] = tcmalloc
    # As vLLM's own `LLM` has it: nobody reads its statistics here.
    options = (
        {"dtype": "bfloat16", "enable_prefix_caching": False, "disable_log_stats": True} | limits | options
    )
    return System(name, ".rivals/vllm", f"{ADAPTERS}.vllm", options, max_rounds, env)


def _tcmalloc() -> str | None:
    """The allocator that vLLM's documentation asks for; None if the machine has none."""
    found = [path for root in (ROOT / ".rivals/tcmalloc", Path("/")) for path in root.glob(TCMALLOC)]
    return str(found[0]) if found else None


def _llama_cpp(name: str, gguf: str, max_rounds: Mapping[str, int]) -> System:
    options = {
        "gguf": gguf,
        "n_batch": 2048,
        "n_ubatch": 512,
        "n_threads": NUM_THREADS,
        "n_threads_batch": NUM_THREADS,
        "flash_attn_type": 1,
    }
    return System(name, ".rivals/llama", f"{ADAPTERS}.llama_cpp", options, max_rounds)


def _hf(mode: str, max_rounds: Mapping[str, int]) -> System:
    return System(
        f"hf-{mode}", ".rivals/hf", f"{ADAPTERS}.hf", {"mode": mode}, max_rounds, {"HF_HUB_OFFLINE": "1"}
    )


SYSTEMS = {
    system.name: system
    for system in (
        _ingine("ingine", EVERYTHING),
        _ingine("ingine-prefix", PREFIX_ONLY, enable_prefix_caching=True),
        _ingine("ingine-int8", BY_STREAMS | {"32x400": ALWAYS}, quantization="int8"),
        _ingine("ingine-int8-kv", LONG_CONTEXT, quantization="int8", kv_cache_dtype="int8"),
        _vllm("vllm", EVERYTHING),
        _vllm("vllm-prefix", PREFIX_ONLY, enable_prefix_caching=True),
        # The budget that ingine has by default: smaller steps, for the time between tokens.
        _vllm("vllm-512", {ARRIVALS: ALWAYS}, max_num_batched_tokens=512),
        # Nothing is compiled, so it starts sooner and runs slower.
        _vllm("vllm-eager", STARTS | {"32x41": ALWAYS}, enforce_eager=True),
        # llama.cpp takes minutes for the larger workloads, which its slower two files are spared.
        _llama_cpp("llama.cpp-bf16", "BF16", dict.fromkeys(EVERYTHING, 1) | LLAMA_OFTEN | STARTS),
        _llama_cpp("llama.cpp-q8_0", "Q8_0", LLAMA_SELDOM),
        _llama_cpp("llama.cpp-q4_1", "Q4_1", LLAMA_SELDOM),
        # One after the other is as fast with 8 as with 128.
        _hf("sequential", {"1x41": ALWAYS, "8x41": 1, **STARTS}),
        _hf("padded", dict.fromkeys(["8x41", "32x41", "64x41", "128x41", "32x400"], 1)),
        _hf("continuous", {"8x41": 1, "32x41": 1}),
    )
}
