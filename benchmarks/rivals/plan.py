"""The systems, their settings, and the rounds of each workload. README.md gives the reasons."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.machine import cpu_flags, is_amd
from benchmarks.rivals.child import ROOT
from benchmarks.rivals.workloads import ARRIVALS, START_COLD, START_WARM, WORKLOADS

NUM_THREADS = os.cpu_count() or 1
MAX_NUM_SEQS = 128
MAX_MODEL_LEN = 2304
"""Enough for the longest request: 2,000 + 128."""
KV_GIB = 1
"""KV memory: 47,000 tokens in bfloat16; the largest workload has 21,000."""

ADAPTERS = "benchmarks.rivals.systems"
TCMALLOC = "usr/lib/*/libtcmalloc_minimal.so.4"
REFERENCE = "vllm"
"""The system of whose capacity the rate of arrivals is a share."""
LOAD = 0.7

ALWAYS = 99
STARTS = {START_COLD: ALWAYS, START_WARM: ALWAYS}
EVERYTHING = dict.fromkeys([*WORKLOADS, ARRIVALS], ALWAYS) | STARTS
PREFIX_ONLY = {"32-shared": ALWAYS}
BY_STREAMS = dict.fromkeys(["1x41", "8x41", "32x41", "64x41", "128x41"], ALWAYS)
LONG_CONTEXT = dict.fromkeys(["32x41", "32x400", "8x2000"], ALWAYS)
LLAMA_OFTEN = dict.fromkeys(["1x41", "8x41", "32x41", "64x41"], ALWAYS)
LLAMA_SELDOM = {"1x41": ALWAYS, "8x41": 1, "32x41": 1}
SAME_FILE = dict.fromkeys(["1x41", "8x41", "32x41"], ALWAYS)
STATIC = dict.fromkeys(["1x41", "8x41", "32x41", "32x400", "8x2000"], ALWAYS)
"""The workloads of static batches. The last two have prompts of one length."""


@dataclass(frozen=True)
class Files:
    """Files that a system reads instead of the model's folder, made once by `python -m module MODEL PATH
    kind`."""

    name: str
    """Name of the file or folder that is made."""
    venv: str
    module: str
    kind: str


@dataclass(frozen=True)
class System:
    name: str
    venv: str
    """Folder of its virtual environment, under the repository's root."""
    module: str
    """The module that answers calls, see `protocol.py`."""
    options: Mapping[str, Any]
    max_rounds: Mapping[str, int]
    """Rounds by workload. A missing workload is not run; slow ones run in fewer rounds."""
    env: Mapping[str, str] = field(default_factory=dict)
    files: Files | None = None
    """The files it reads. Their path is in the child's option `files`."""
    why_not: str | None = None
    """The reason why it does not run on this machine."""


def _ingine(name: str, max_rounds: Mapping[str, int], **options: Any) -> System:
    limits = {"max_num_seqs": MAX_NUM_SEQS, "max_model_len": MAX_MODEL_LEN, "kv_cache_bytes": KV_GIB << 30}
    options = {"enable_prefix_caching": False, **limits, **options}
    return System(name, ".venv", f"{ADAPTERS}.ingine", options, max_rounds)


def _ingine_gguf(file_type: str, max_rounds: Mapping[str, int]) -> System:
    """ingine on llama.cpp's file, instead of the folder that was made from the published file."""
    return replace(_ingine(f"ingine-{file_type.lower()}", max_rounds), files=_gguf(file_type))


def _vllm(name: str, max_rounds: Mapping[str, int], **options: Any) -> System:
    limits = {"max_num_seqs": MAX_NUM_SEQS, "max_model_len": MAX_MODEL_LEN}
    env = {
        "OMP_NUM_THREADS": str(NUM_THREADS),
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{NUM_THREADS - 1}",
        "VLLM_CPU_KVCACHE_SPACE": str(KV_GIB),
        # The engine runs in the process that steps it: on two cores a second process only takes time from it.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # On a CPU, the cache that this keeps between starts cannot be read (0.32.0), and each start
        # compiles again; with the older cache it does not.
        "VLLM_USE_AOT_COMPILE": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    if tcmalloc := _tcmalloc():
        env["LD_PRELOAD"] = tcmalloc
    # As in vLLM's own `LLM`: the statistics are not read here.
    options = (
        {"dtype": "bfloat16", "enable_prefix_caching": False, "disable_log_stats": True} | limits | options
    )
    return System(name, ".rivals/vllm", f"{ADAPTERS}.vllm", options, max_rounds, env)


def _vllm_zen(max_rounds: Mapping[str, int]) -> System:
    """vLLM with AMD's extension of torch, which vLLM uses wherever it is installed."""
    fits = is_amd() and "avx512f" in cpu_flags()
    why_not = None if fits else "zentorch is for AMD's processors with AVX-512"
    system = _vllm("vllm-zen", max_rounds, platform="ZenCpuPlatform")
    return replace(system, venv=".rivals/vllm-zen", why_not=why_not)


def _tcmalloc() -> str | None:
    """The allocator that vLLM's documentation recommends; None if the machine lacks it."""
    found = [path for root in (ROOT / ".rivals/tcmalloc", Path("/")) for path in root.glob(TCMALLOC)]
    return str(found[0]) if found else None


def _gguf(file_type: str) -> Files:
    return Files(f"{file_type}.gguf", ".rivals/llama", f"{ADAPTERS}.gguf_files", file_type)


def _llama_cpp(file_type: str, max_rounds: Mapping[str, int]) -> System:
    options = {
        "n_batch": 2048,
        "n_ubatch": 512,
        "n_threads": NUM_THREADS,
        "n_threads_batch": NUM_THREADS,
        "flash_attn_type": 1,
    }
    return System(
        f"llama.cpp-{file_type.lower()}",
        ".rivals/llama",
        f"{ADAPTERS}.llama_cpp",
        options,
        max_rounds,
        files=_gguf(file_type),
    )


def _openvino(kind: str, max_rounds: Mapping[str, int], *, weights: str, precision: str) -> System:
    options = {
        "scheduler": {
            "cache_size": KV_GIB,
            "max_num_seqs": MAX_NUM_SEQS,
            "max_num_batched_tokens": 2048,
            "enable_prefix_caching": False,
        },
        "properties": {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": NUM_THREADS},
    }
    # On a processor without bfloat16, the plugin silently computes in float32.
    lacks = precision == "bf16" and _fastest_precision() != "bf16"
    venv, module = ".rivals/openvino", f"{ADAPTERS}.openvino"
    return System(
        f"openvino-{kind}",
        venv,
        module,
        options,
        max_rounds,
        {"HF_HUB_OFFLINE": "1"},
        Files(f"openvino-{weights}", venv, f"{module}_files", weights),
        "this processor has no bfloat16" if lacks else None,
    )


def _fastest_precision() -> str:
    """The fastest precision of activations with compressed weights."""
    return "bf16" if {"avx512_bf16", "amx_bf16"} & set(cpu_flags()) else "f32"


def _onnxruntime(kind: str, max_rounds: Mapping[str, int]) -> System:
    venv, module = ".rivals/onnxruntime", f"{ADAPTERS}.onnxruntime"
    files = Files(f"onnxruntime-{kind}", venv, f"{module}_files", kind)
    return System(f"onnxruntime-{kind}", venv, module, {}, max_rounds, files=files)


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
        _ingine("ingine-int4", BY_STREAMS | {"32x400": ALWAYS}, quantization="int4"),
        _ingine_gguf("Q8_0", SAME_FILE),
        _ingine_gguf("Q4_K_M", SAME_FILE),
        _ingine_gguf("Q4_1", SAME_FILE),
        _vllm("vllm", EVERYTHING),
        _vllm("vllm-prefix", PREFIX_ONLY, enable_prefix_caching=True),
        # ingine's default budget: smaller steps shorten the time between tokens.
        _vllm("vllm-512", {ARRIVALS: ALWAYS}, max_num_batched_tokens=512),
        # Without compilation it starts sooner and runs slower.
        _vllm("vllm-eager", STARTS | {"32x41": ALWAYS}, enforce_eager=True),
        _vllm_zen(BY_STREAMS | {"32x400": ALWAYS}),
        _openvino("bf16", BY_STREAMS | LONG_CONTEXT | STARTS, weights="f32", precision="bf16"),
        _openvino("f32", SAME_FILE, weights="f32", precision="f32"),
        _openvino("int8", BY_STREAMS | LONG_CONTEXT, weights="int8", precision=_fastest_precision()),
        _openvino("int4", SAME_FILE, weights="int4", precision=_fastest_precision()),
        _onnxruntime("int8", STATIC),
        _onnxruntime("int4", STATIC),
        # llama.cpp takes minutes for the larger workloads, so only one of its files runs them.
        _llama_cpp("BF16", dict.fromkeys(EVERYTHING, 1) | LLAMA_OFTEN | STARTS),
        _llama_cpp("Q8_0", LLAMA_SELDOM),
        _llama_cpp("Q4_K_M", LLAMA_SELDOM),
        _llama_cpp("Q4_1", LLAMA_SELDOM),
        _llama_cpp("Q4_0", LLAMA_SELDOM),
        # One request at a time has the same rate with 8 as with 128.
        _hf("sequential", {"1x41": ALWAYS, "8x41": 1, **STARTS}),
        _hf("padded", dict.fromkeys(["8x41", "32x41", "64x41", "128x41", "32x400"], 1)),
        _hf("continuous", {"8x41": 1, "32x41": 1}),
    )
}
