"""GGUF files: converted once to a Hugging Face folder, then loaded like any other model.

The weights are dequantised: the aim is that a model which only exists as GGUF runs, not that it stays small.
Names and layouts of tensors and metadata: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ingine.errors import ConfigError, UnsupportedModel
from ingine.generation_config import recommended_by_gguf
from ingine.models.gguf_tokenizer import save_tokenizer
from ingine.models.loader import WEIGHTS, WEIGHTS_INDEX
from ingine.models.rope import rope_frequencies

MAX_SHARD_BYTES = 2 << 30
Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes there are."""


@dataclass(frozen=True)
class _Family:
    architecture: str
    model_type: str
    permuted: bool
    """llama.cpp reorders query and key rows of these, for a rotation that pairs neighbours."""


FAMILIES = {
    "llama": _Family("LlamaForCausalLM", "llama", permuted=True),  # also most Mistral files
    "mistral": _Family("MistralForCausalLM", "mistral", permuted=True),
    "qwen2": _Family("Qwen2ForCausalLM", "qwen2", permuted=False),
    "qwen3": _Family("Qwen3ForCausalLM", "qwen3", permuted=False),
}
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
_ROPE_FREQS = "rope_freqs.weight"


def convert_gguf(
    gguf_path: Path, out_dir: Path, *, dtype: torch.dtype = torch.bfloat16, progress: Progress | None = None
) -> None:
    """Write the model in `gguf_path` to the new folder `out_dir`: config, weights, tokenizer, chat template.

    `out_dir` appears whole or not at all. Only one caller at a time for one `out_dir`. Raises ConfigError for
    a file that is damaged or a folder that cannot be written, UnsupportedModel for what would not run here.
    """
    partial = out_dir.with_name(f"{out_dir.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a conversion that was killed
    partial.mkdir(parents=True)
    try:
        file = _GGUFFile.open(gguf_path)
        _write_json(partial / "config.json", file.config(dtype))
        generation_config = {"eos_token_id": file.eos_token_ids()} | recommended_by_gguf(file.metadata)
        _write_json(partial / "generation_config.json", generation_config)
        save_tokenizer(file.metadata, gguf_path, partial)
        _save_weights(file, partial, dtype, progress or (lambda done, total: None))
        partial.rename(out_dir)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{gguf_path} cannot be converted to {out_dir}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@dataclass(frozen=True)
class _GGUFFile:
    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, gguf.ReaderTensor]
    family: _Family

    @classmethod
    def open(cls, path: Path) -> "_GGUFFile":
        try:
            reader = gguf.GGUFReader(path)
            metadata = {name: field.contents() for name, field in reader.fields.items()}
        except OSError:
            raise
        except Exception as error:  # the reader checks little: damage shows as an error of any kind
            raise ConfigError(f"{path} is damaged or not a GGUF file: {error}") from error
        name = metadata.get("general.architecture")
        if name not in FAMILIES:
            raise UnsupportedModel(
                f"unsupported GGUF architecture: {name}. Those that work: {', '.join(FAMILIES)}"
            )
        return cls(path, metadata, {tensor.name: tensor for tensor in reader.tensors}, FAMILIES[name])

    def get(self, key: str, default: Any = None) -> Any:
        """Metadata that bears the architecture's name; without a default it must be there."""
        value = self.metadata.get(f"{self.metadata['general.architecture']}.{key}", default)
        if value is None:
            raise ConfigError(f"{self.path} lacks the metadata {key}")
        return value

    @property
    def num_heads(self) -> int:
        return self.get("attention.head_count")

    @property
    def num_kv_heads(self) -> int:
        return self.get("attention.head_count_kv", self.num_heads)

    @property
    def head_dim(self) -> int:
        return self.get("attention.key_length", self.get("embedding_length") // self.num_heads)

    def eos_token_ids(self) -> list[int]:
        """The end of a sequence and, where a chat model has another, the end of a turn."""
        named = (self.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot"))
        return list(dict.fromkeys(token_id for token_id in named if token_id is not None))

    def config(self, dtype: torch.dtype) -> dict[str, Any]:
        if self.get("rope.dimension_count", self.head_dim) != self.head_dim:
            raise UnsupportedModel("unsupported: rotation of a part of each head")
        config = {
            "architectures": [self.family.architecture],
            "model_type": self.family.model_type,
            "dtype": str(dtype).removeprefix("torch."),
            "vocab_size": int(self._tensor("token_embd.weight").shape[1]),
            "hidden_size": self.get("embedding_length"),
            "intermediate_size": self.get("feed_forward_length"),
            "num_hidden_layers": self.get("block_count"),
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": _decimal(self.get("attention.layer_norm_rms_epsilon")),
            "max_position_embeddings": self.get("context_length"),
            "rope_parameters": self._rope_parameters(),
            "tie_word_embeddings": "output.weight" not in self.tensors,
            "attention_bias": "blk.0.attn_output.bias" in self.tensors,
            "bos_token_id": self.metadata.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self.metadata.get("tokenizer.ggml.eos_token_id"),
        }
        if self.family.model_type == "mistral":
            config["sliding_window"] = self.get("attention.sliding_window", 0) or None
        return config

    def _rope_parameters(self) -> dict[str, Any]:
        parameters = {"rope_type": "default", "rope_theta": _decimal(self.get("rope.freq_base", 10_000.0))}
        if _ROPE_FREQS in self.tensors:
            return self._llama3_rope(parameters["rope_theta"])
        scaling = self.get("rope.scaling.type", "none")
        if scaling == "none":
            return parameters
        parameters |= {"rope_type": scaling, "factor": self.get("rope.scaling.factor")}
        if scaling == "yarn":
            parameters["original_max_position_embeddings"] = self.get("rope.scaling.original_context_length")
        return parameters

    def _llama3_rope(self, rope_theta: float) -> dict[str, Any]:
        """Llama 3's scaling lies in the file as a divisor a frequency; find the parameters it came from."""
        divisors = torch.tensor(self._dequantize(self._tensor(_ROPE_FREQS)))
        parameters = {
            "rope_type": "llama3",
            "rope_theta": rope_theta,
            "factor": round(divisors.max().item(), 3),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        plain = rope_frequencies({"rope_type": "default", "rope_theta": rope_theta}, self.head_dim)
        if not torch.allclose(plain / rope_frequencies(parameters, self.head_dim), divisors, rtol=1e-3):
            raise UnsupportedModel("unsupported: rotary frequencies other than those of Llama 3")
        return parameters

    def weights(self) -> Iterator[tuple[str, np.ndarray]]:
        """Every tensor under its Hugging Face name, in float32 and Hugging Face's layout."""
        for name, tensor in self.tensors.items():
            if name == _ROPE_FREQS:
                continue
            weight = self._dequantize(tensor)
            if self.family.permuted and ".attn_q." in name:
                weight = _unpermute(weight, self.num_heads)
            elif self.family.permuted and ".attn_k." in name:
                weight = _unpermute(weight, self.num_kv_heads)
            yield _hf_name(name), weight

    def _tensor(self, name: str) -> gguf.ReaderTensor:
        if name not in self.tensors:
            raise ConfigError(f"{self.path} lacks the tensor {name}")
        return self.tensors[name]

    def _dequantize(self, tensor: gguf.ReaderTensor) -> np.ndarray:
        try:
            return gguf.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            raise UnsupportedModel(f"unsupported quantisation: {tensor.tensor_type.name}") from None


def _save_weights(file: _GGUFFile, folder: Path, dtype: torch.dtype, progress: Progress) -> None:
    """In shards, so that no more than one of them is in memory at a time."""
    total = sum(int(tensor.n_elements) for tensor in file.tensors.values()) * dtype.itemsize
    weight_map: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    shards: list[Path] = []
    done = shard_bytes = 0

    def flush() -> None:
        shards.append(folder / f"model-{len(shards) + 1:05}.safetensors")
        save_file(shard, shards[-1], metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, shards[-1].name))
        shard.clear()

    for name, weight in file.weights():
        tensor = torch.tensor(weight, dtype=dtype)
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
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    *prefix, tensor, kind = name.split(".")
    if tensor not in _TENSORS:
        raise UnsupportedModel(f"unsupported: the tensor {name} has no place in the model")
    layer = f"model.layers.{prefix[1]}." if prefix else ""
    return f"{layer}{_TENSORS[tensor]}.{kind}"


def _unpermute(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows (or biases) of each head from (x0, y0, x1, y1, ...) back to (x0, x1, ..., y0, y1, ...)."""
    pairs = weight.reshape(num_heads, weight.shape[0] // num_heads // 2, 2, *weight.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def _decimal(value: float) -> float:
    """A float32 as the number somebody wrote: 1e-05, not 9.999999747378752e-06."""
    return float(f"{value:.6g}")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
