"""Measures a step's attention, all layers together: `python benchmarks/attention.py [part of a name ...]`.

Every layer has a cache of its own, as in a model; with a shared one, a step would find the last layer's keys
in the CPU's cache. Backends take turns within a case. Each figure is the minimum of its rounds, since other
work only adds time.
"""

import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ingine.engine.kernels import native
from ingine.engine.kernels.attention import (
    AttentionBackend,
    AttentionMetadata,
    NativeAttention,
    TorchAttention,
)

BLOCK_SIZE = 16
CPU = torch.device("cpu")
SECONDS = 2.0
"""Measuring time of a backend and case, which has at least two rounds."""


@dataclass(frozen=True)
class Layers:
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Case:
    num_seqs: int
    query_len: int
    kv_len: int


MODELS = {"SmolLM2-135M": Layers(30, 9, 3, 64), "Qwen2.5-1.5B": Layers(28, 12, 2, 128)}

CASES = {
    "decode 1x100": Case(1, 1, 100),
    "decode 32x100": Case(32, 1, 100),
    "decode 128x100": Case(128, 1, 100),
    "decode 32x400": Case(32, 1, 400),
    "decode 32x500": Case(32, 1, 500),
    "decode 8x2000": Case(8, 1, 2000),
    "decode 32x2000": Case(32, 1, 2000),
    "verify 5 tokens 8x100": Case(8, 5, 100),
    "verify 5 tokens 32x100": Case(32, 5, 100),
    "prefill 41": Case(1, 41, 41),
    "prefill 400": Case(1, 400, 400),
    "prefill 2000": Case(1, 2000, 2000),
    "prefill 512 after 1500": Case(1, 512, 2012),
}


def make_metadata(case: Case, num_blocks: int) -> AttentionMetadata:
    """Metadata with blocks in a random order, as after some time of allocations."""
    per_seq = num_blocks // case.num_seqs
    blocks = random.Random(0).sample(range(num_blocks), num_blocks)
    tables = [blocks[i * per_seq : (i + 1) * per_seq] for i in range(case.num_seqs)]
    slots = [
        table[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
        for table in tables
        for position in range(case.kv_len - case.query_len, case.kv_len)
    ]
    query_lens = [case.query_len] * case.num_seqs
    return AttentionMetadata(
        slot_mapping=torch.tensor(slots),
        block_tables=torch.tensor(tables, dtype=torch.int32),
        seq_lens=torch.full((case.num_seqs,), case.kv_len, dtype=torch.int32),
        query_start_loc=torch.arange(case.num_seqs + 1, dtype=torch.int32) * case.query_len,
        num_decodes=query_lens.count(1),
        query_lens=query_lens,
        kv_lens=[case.kv_len] * case.num_seqs,
    )


def make_step(backend: AttentionBackend, dtype: torch.dtype, model: Layers, case: Case) -> Callable[[], None]:
    """A function that computes a whole step's attention, planned again each time, as in the engine."""
    num_blocks = case.num_seqs * -(-case.kv_len // BLOCK_SIZE)
    kv_caches = [
        backend.allocate_kv_cache(num_blocks, BLOCK_SIZE, model.num_kv_heads, model.head_dim, dtype, CPU)
        for _ in range(model.num_layers)
    ]
    for kv_cache in kv_caches:
        for memory in kv_cache:
            memory.zero_()
    metadata = make_metadata(case, num_blocks)
    num_tokens = case.num_seqs * case.query_len
    merged = torch.randn(num_tokens, model.num_heads + 2 * model.num_kv_heads, model.head_dim, dtype=dtype)
    query, key, value = merged.split((model.num_heads, model.num_kv_heads, model.num_kv_heads), dim=1)
    angles = torch.randn(num_tokens, 1, model.head_dim)
    rotation = angles.cos().to(dtype), angles.sin().to(dtype)

    def step() -> None:
        metadata.plan.clear()
        for kv_cache in kv_caches:
            backend.forward(
                query,
                key,
                value,
                kv_cache,
                metadata,
                scale=model.head_dim**-0.5,
                sliding_window=None,
                rotation=rotation,
            )

    return step


def least_seconds(steps: dict[str, Callable[[], None]]) -> dict[str, float]:
    least = dict.fromkeys(steps, float("inf"))
    for step in steps.values():
        step()
    deadline = time.perf_counter() + SECONDS * len(steps)
    num_rounds = 0
    while num_rounds < 2 or time.perf_counter() < deadline:
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            least[name] = min(least[name], time.perf_counter() - started)
        num_rounds += 1
    return least


def rate(model: Layers, case: Case, kv_bytes: int, seconds: float) -> str:
    """The rate: of memory if few tokens read much KV, of arithmetic if many tokens read it."""
    if case.query_len < 16:
        total = case.num_seqs * case.kv_len * model.num_layers * kv_bytes
        return f"{total / seconds / 1e9:6.1f} GB/s"
    pairs = case.num_seqs * case.query_len * (case.kv_len - (case.query_len - 1) / 2)
    total = 4 * model.num_layers * model.num_heads * model.head_dim * pairs
    return f"{total / seconds / 1e9:6.0f} GFLOP/s"


def main(wanted: list[str]) -> None:
    library = native.library()
    if library is None:
        raise SystemExit("the native kernels cannot be compiled here")
    backends = {
        "native bf16": (NativeAttention(library), torch.bfloat16),
        "native int8": (NativeAttention(library, "int8"), torch.bfloat16),
        "native int4": (NativeAttention(library, "int4"), torch.bfloat16),
        "native float32": (NativeAttention(library), torch.float32),
        "torch bf16": (TorchAttention(), torch.bfloat16),
    }
    print(f"{torch.get_num_threads()} threads; ms a step, all layers")
    for model_name, model in MODELS.items():
        for case_name, case in CASES.items():
            if wanted and not any(part in f"{model_name} {case_name}" for part in wanted):
                continue
            steps = {name: make_step(*backend, model, case) for name, backend in backends.items()}
            print(f"\n{model_name}, {case_name}")
            for name, seconds in least_seconds(steps).items():
                backend, dtype = backends[name]
                kv_bytes = backend.bytes_per_block(BLOCK_SIZE, model.num_kv_heads, model.head_dim, dtype)
                print(
                    f"  {name:15} {1e3 * seconds:9.2f}  {rate(model, case, kv_bytes / BLOCK_SIZE, seconds)}"
                )


if __name__ == "__main__":
    with torch.inference_mode():
        main(sys.argv[1:])
