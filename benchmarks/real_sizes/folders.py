"""Writes a Hugging Face folder with random weights in bfloat16, one shard at a time."""

import json
import math
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.real_sizes.shapes import Shape, TensorSpec, tensors

SHARD_BYTES = 1 << 30


def write_folder(folder: Path, shape: Shape, *, tokenizer: Path, seed: int = 0) -> None:
    """Write `folder`, atomically. tokenizer: a tokenizer.json, with its config in the same folder."""
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    draw = torch.Generator().manual_seed(seed)
    weight_map, total_bytes = {}, 0
    for number, shard in enumerate(_shards(shape)):
        name = f"model-{number:05}.safetensors"
        made = {spec.hf_name: _random(draw, spec) for spec in shard}
        save_file(made, unfinished / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(made, name)
        total_bytes += sum(tensor.nbytes for tensor in made.values())
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (unfinished / "model.safetensors.index.json").write_text(json.dumps(index))
    (unfinished / "config.json").write_text(json.dumps(_config(shape)))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer.with_name(name), unfinished)
    unfinished.rename(folder)


def _shards(shape: Shape) -> list[list[TensorSpec]]:
    shards: list[list[TensorSpec]] = []
    num_bytes = SHARD_BYTES
    for spec in tensors(shape):
        size = 2 * math.prod(spec.shape)
        if num_bytes + size > SHARD_BYTES:
            shards.append([])
            num_bytes = 0
        shards[-1].append(spec)
        num_bytes += size
    return shards


def _random(draw: torch.Generator, spec: TensorSpec) -> torch.Tensor:
    """Draw a tensor with the distribution of the GGUF files: see `gguf_models.random_tensor`."""
    made = torch.empty(spec.shape, dtype=torch.bfloat16)
    if len(spec.shape) == 2:
        return made.normal_(0, 1 / math.sqrt(spec.shape[1]), generator=draw)
    mean = 1.0 if spec.hf_name.endswith("norm.weight") else 0.0
    return made.normal_(mean, 0.1, generator=draw)


def _config(shape: Shape) -> dict:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "hidden_act": "silu",
        "rms_norm_eps": shape.rms_norm_eps,
        "max_position_embeddings": shape.max_position_embeddings,
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": shape.tied,
        "use_sliding_window": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": None,
        "eos_token_id": None,
    }
