"""llama.cpp through the low-level API of llama-cpp-python: many sequences in one llama_batch.

Options: `files`, the GGUF file (see `gguf_files.py`), and fields of `llama_context_params`. Each sequence has
its own part of the KV cache (no `kv_unified`, with which every token would scan all sequences' cells), so the
context is made for the requests of a run, outside the measured time.
"""

import ctypes
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import llama_cpp

from benchmarks.rivals.protocol import Loaded, Recording, Request, serve
from benchmarks.rivals.stepping import Stepping
from benchmarks.rivals.systems.llama_steps import LlamaSteps

MAX_NUM_SEQS = 128
CELLS = 256
"""Granularity of a sequence's part of the KV cache, in tokens."""


class LlamaCpp:
    """llama.cpp with one context. Raises RuntimeError if llama.cpp refuses; the reason is in its log."""

    def __init__(self, path: str, options: dict[str, Any]):
        llama_cpp.llama_backend_init()
        self._options = options
        self._model = llama_cpp.llama_model_load_from_file(
            path.encode(), llama_cpp.llama_model_default_params()
        )
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        self._num_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._context: Any = None
        self._shape = (0, 0)

    def run(self, requests: Sequence[Request]) -> Recording:
        num_seqs = min(len(requests), MAX_NUM_SEQS)
        longest = max(len(request.prompt) + request.num_tokens for request in requests)
        self._fit(num_seqs, -(-longest // CELLS) * CELLS)
        steps = LlamaSteps(
            self._context, num_vocab=self._num_vocab, num_seqs=num_seqs, n_batch=self._options["n_batch"]
        )
        return Stepping(steps).run(requests)

    def _fit(self, num_seqs: int, num_cells: int) -> None:
        if self._shape == (num_seqs, num_cells):
            return
        if self._context:
            llama_cpp.llama_free(self._context)
        params = llama_cpp.llama_context_default_params()
        for name, value in self._options.items():
            if not hasattr(params, name):
                raise ValueError(f"llama_context_params has no field {name}")
            setattr(params, name, value)
        params.n_seq_max, params.n_ctx, params.kv_unified = num_seqs, num_seqs * num_cells, False
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp makes no context of {num_seqs} times {num_cells} tokens")
        self._shape = (num_seqs, num_cells)


def load(model: str, options: dict[str, Any]) -> Loaded:
    options = dict(options)
    path = Path(options.pop("files"))
    return Loaded(
        LlamaCpp(str(path), options),
        versions={"llama-cpp-python": version("llama-cpp-python")},
        settings={
            **options,
            "gguf": path.name,
            "gguf_bytes": path.stat().st_size,
            "system_info": ctypes.string_at(llama_cpp.llama_print_system_info()).decode(),
        },
    )


if __name__ == "__main__":
    serve(load)
