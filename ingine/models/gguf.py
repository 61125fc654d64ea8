"""GGUF files: converted once to a Hugging Face folder, then loaded like any other model.

The weights are dequantised: the aim is that a model which only exists as GGUF runs, not that it stays small.
"""

import errno
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ingine.errors import ConfigError, UnsupportedModel
from ingine.model_files import WEIGHTS, WEIGHTS_INDEX
from ingine.models.checkpoint import some
from ingine.models.config import ModelConfig
from ingine.models.gguf_config import ROPE_FREQS, config_of, recommended_sampling
from ingine.models.gguf_file import FAMILIES, GGUFFile
from ingine.models.gguf_tokenizer import end_token_ids, save_tokenizer
from ingine.models.weight_shapes import expected_shapes

MAX_SHARD_BYTES = 2 << 30
_NAME = re.compile(r"(blk\.(?P<layer>0|[1-9][0-9]{0,4})\.)?(?P<tensor>[a-z_]+)\.(?P<kind>weight|bias)")
Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes there are."""

_DTYPES = {GGMLQuantizationType.F16: torch.float16, GGMLQuantizationType.BF16: torch.bfloat16}
"""What a tensor is stored in: a type that holds all its numbers, since the engine may run in any. float32 for
the others, quantised ones too."""

_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert_gguf(gguf_path: Path, out_dir: Path, *, progress: Progress | None = None) -> None:
    """Write the model in `gguf_path` to the new folder `out_dir`: config, weights, tokenizer, chat template.

    Of a model in several files, `gguf_path` is any. `out_dir` appears whole or not at all. Only one caller at
    a time for one `out_dir`. Raises ConfigError for a file that is damaged or a folder that cannot be
    written, UnsupportedModel for what would not run here.
    """
    partial = out_dir.with_name(f"{out_dir.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a conversion that was killed
    partial.mkdir(parents=True)
    try:
        file = GGUFFile.open(gguf_path)
        names = {name: _hf_name(name) for name in file.tensors if name != ROPE_FREQS}
        _write_json(partial / "config.json", config_of(file) | {"dtype": _dtype_name(file)})
        _check_tensors(file, names, _read_config(partial, gguf_path))
        generation_config = {"eos_token_id": end_token_ids(file)} | recommended_sampling(file)
        _write_json(partial / "generation_config.json", generation_config)
        save_tokenizer(file, partial)
        _save_weights(file, names, partial, progress or (lambda done, total: None))
        partial.rename(out_dir)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{gguf_path} cannot be converted to {out_dir}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _read_config(folder: Path, gguf_path: Path) -> ModelConfig:
    try:
        return ModelConfig.from_folder(folder)
    except ConfigError as error:  # it names a file that will be gone
        said = str(error).replace(str(folder / "config.json"), f"{gguf_path}, of which a config.json is made")
        raise type(error)(said.replace(str(folder), str(gguf_path))) from error


def _dtype_name(file: GGUFFile) -> str:
    """Of the weights, as config.json has it: that of the embedding."""
    return str(_dtype(file, "token_embd.weight")).removeprefix("torch.")


def _dtype(file: GGUFFile, name: str) -> torch.dtype:
    return _DTYPES.get(file.tensor(name).tensor_type, torch.float32)


def _check_tensors(file: GGUFFile, names: dict[str, str], config: ModelConfig) -> None:
    """Raises unless the file has exactly the tensors of such a model: a conversion that cannot be loaded is
    worth nothing, and would stay. `names`: from the file's to Hugging Face's.
    """
    expected = expected_shapes(config)
    if missing := expected.keys() - names.values():
        raise ConfigError(f"{file.path}: weights are missing: {some(missing)}")
    for name, hf_name in names.items():
        if hf_name not in expected:
            raise UnsupportedModel(f"unsupported: the tensor {name!r:.100} has no place in the model")
        shape = list(reversed(file.tensors[name].shape))
        if shape != expected[hf_name]:
            raise ConfigError(f"{file.path}: {name} is {shape}, its metadata say {expected[hf_name]}")


def _weights(file: GGUFFile, names: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under its Hugging Face name and in Hugging Face's layout."""
    num_heads = file.integer("attention.head_count")
    num_kv_heads = file.integer("attention.head_count_kv", num_heads)
    for name, hf_name in names.items():
        weight = file.dequantized(name)
        if FAMILIES[file.arch].permuted and ".attn_q." in name:
            weight = _unpermute(weight, num_heads)
        elif FAMILIES[file.arch].permuted and ".attn_k." in name:
            weight = _unpermute(weight, num_kv_heads)
        yield hf_name, torch.tensor(weight, dtype=_dtype(file, name))


def _save_weights(file: GGUFFile, names: dict[str, str], folder: Path, progress: Progress) -> None:
    """In shards, so that no more than one of them is in memory at a time."""
    total = sum(file.tensors[name].num_elements * _dtype(file, name).itemsize for name in names)
    if total > (free := shutil.disk_usage(folder).free):  # rather than fill the disk of others first
        raise OSError(errno.ENOSPC, f"the weights take {total} bytes, and there are {free} left", str(folder))
    weight_map: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    shards: list[Path] = []
    done = shard_bytes = 0

    def flush() -> None:
        shards.append(folder / f"model-{len(shards) + 1:05}.safetensors")
        save_file(shard, shards[-1], metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, shards[-1].name))
        shard.clear()

    for name, tensor in _weights(file, names):
        if shard and shard_bytes + tensor.nbytes > MAX_SHARD_BYTES:
            flush()
            shard_bytes = 0
        shard[name] = tensor
        shard_bytes += tensor.nbytes
        done += tensor.nbytes
        progress(done, total)
    flush()
    if len(shards) == 1:
        shards[0].rename(folder / WEIGHTS)
    else:
        _write_json(folder / WEIGHTS_INDEX, {"metadata": {"total_size": done}, "weight_map": weight_map})


def _hf_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`. No two names give the same."""
    match = _NAME.fullmatch(name)
    if not match or match["tensor"] not in _TENSORS:
        raise UnsupportedModel(f"unsupported: the tensor {name!r:.100} has no place in the model")
    layer = f"model.layers.{match['layer']}." if match["layer"] else ""
    return f"{layer}{_TENSORS[match['tensor']]}.{match['kind']}"


def _unpermute(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows (or biases) of each head from (x0, y0, x1, y1, ...) back to (x0, x1, ..., y0, y1, ...)."""
    pairs = weight.reshape(num_heads, weight.shape[0] // num_heads // 2, 2, *weight.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
