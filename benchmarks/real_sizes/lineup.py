"""The combinations of model, engine and weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.real_sizes.shapes import Shape
from benchmarks.rivals.plan import SYSTEMS, System

STEP_TOKENS = 2048
"""Token budget of a step, for both engines: prompts take few steps, so most of the decoding comes after
them."""
CELLS = 256
"""Granularity of a sequence's part of llama.cpp's KV cache, in tokens."""


@dataclass(frozen=True)
class Entry:
    model: str
    """A key of SHAPES."""
    engine: str
    """ingine or llama.cpp."""
    weights: str
    """bf16, a folder of safetensors, or the type of a GGUF file."""
    quantization: str | None = None
    """The format to which ingine quantises the folder when loading it."""

    @property
    def name(self) -> str:
        made = f" to {self.quantization}" if self.quantization else ""
        return f"{self.engine} {self.weights}{made}"

    @property
    def venv(self) -> str:
        return self._system.venv

    @property
    def module(self) -> str:
        return self._system.module

    @property
    def _system(self) -> System:
        return SYSTEMS["ingine" if self.engine == "ingine" else "llama.cpp-bf16"]

    def options(self, shape: Shape, path: Path, *, num_seqs: int, num_tokens: int) -> dict[str, Any]:
        """The engine's options for `num_seqs` sequences of `num_tokens` each."""
        if self.engine == "llama.cpp":
            return {**self._system.options, "files": str(path), "n_batch": STEP_TOKENS}
        tokens = num_seqs * -(-num_tokens // CELLS) * CELLS
        return {
            "max_num_seqs": num_seqs,
            "max_model_len": num_tokens,
            "max_num_batched_tokens": max(STEP_TOKENS, num_seqs),
            "kv_cache_bytes": tokens * shape.kv_bytes_per_token,
            "enable_prefix_caching": False,
            "quantization": self.quantization,
        }


def entries(models: Sequence[str]) -> list[Entry]:
    """The entries of the given models. 7B has only 4 bits: more would not fit 24 GiB with room to spare."""
    folder = [Entry("1.5b", "ingine", "bf16", made) for made in (None, "int8", "int4")]
    files = [("1.5b", "Q8_0"), ("1.5b", "Q4_K_M"), ("1.5b", "Q4_0"), ("7b", "Q4_K_M"), ("7b", "Q4_0")]
    shared = [Entry(model, engine, mix) for model, mix in files for engine in ("ingine", "llama.cpp")]
    return [entry for entry in (*folder, *shared) if entry.model in models]
