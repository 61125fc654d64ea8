"""Makes the config.json of a GGUF model from its metadata, every key of which must be known.

A key that begins with the architecture's name, and is neither read nor listed as harmless, is refused by
name: llama.cpp gains keys every month, and each may change what a model computes.
"""

from typing import Any

import torch

from ingine.engine.models.config import MAX_HEAD_DIM
from ingine.engine.models.gguf_file import FAMILIES, GGUFFile, shortest_float
from ingine.engine.models.rope import rope_frequencies
from ingine.errors import ConfigError, UnsupportedModel

ROPE_FREQS = "rope_freqs.weight"

_READ = {
    *("context_length", "embedding_length", "block_count", "feed_forward_length"),
    *("attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"),
    *("attention.layer_norm_rms_epsilon", "attention.sliding_window"),
    *("rope.dimension_count", "rope.freq_base", "rope.scale_linear", "rope.scaling.type"),
    *("rope.scaling.factor", "rope.scaling.original_context_length"),
    *("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"),
}
_HARMLESS = {
    "vocab_size",  # equals the number of rows of the embedding
    "rope.scaling.finetuned",  # whether the model was trained with its scaling, which applies in any case
    "tensor_data_layout",  # the format that the weights were converted from
    "attention.layer_norm_epsilon",  # for layer norms, which these models do not have
}
_NEUTRAL: dict[str, Any] = {
    "attention.causal": True,
    "attention.clamp_kqv": 0,
    "attention.max_alibi_bias": 0,
    "attn_logit_softcapping": 0,
    "final_logit_softcapping": 0,
    "expert_count": 0,
    "expert_used_count": 0,
    "nextn_predict_layers": 0,
    "pooling_type": 0,
    "rope.scaling.attn_factor": 1,
    "rope.scaling.yarn_attn_factor": 1,
    "rope.scaling.yarn_ext_factor": 1,
    "rope.scaling.yarn_log_multiplier": 0,
}
"""For each key, the value that means that the model does not use the feature."""


GGUF_SAMPLING = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_k": "top_k",
    "general.sampling.top_p": "top_p",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}
"""Maps names of metadata to names in generation_config.json."""


def recommended_sampling(file: GGUFFile) -> dict[str, Any]:
    """Return the sampling parameters that the file recommends, by their names in generation_config.json.
    Raises ConfigError.
    """
    found = {name: file.value(key, int | float) for key, name in GGUF_SAMPLING.items()}
    return {
        name: shortest_float(value) if isinstance(value, float) else value
        for name, value in found.items()
        if value is not None
    }


def config_of(file: GGUFFile) -> dict[str, Any]:
    """Return the content of config.json. Raises ConfigError, UnsupportedModel."""
    _refuse_unknown(file)
    num_heads, head_dim = file.integer("attention.head_count"), _head_dim(file)
    window = _sliding_window(file)
    # llama.cpp calls both Llama and Mistral `llama`; only Mistral has a window in every layer.
    family = FAMILIES["mistral" if file.arch == "llama" and window else file.arch]
    config = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": file.vocab_size,
        "hidden_size": file.integer("embedding_length"),
        "intermediate_size": file.integer("feed_forward_length"),
        "num_hidden_layers": _num_layers(file),
        "num_attention_heads": num_heads,
        "num_key_value_heads": file.integer("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": file.number("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": file.integer("context_length"),
        "rope_parameters": _rope_parameters(file, head_dim),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_output.bias" in file.tensors,
        "bos_token_id": file.token_id("bos"),
        "eos_token_id": file.token_id("eos"),
    }
    if family.model_type == "mistral":
        config["sliding_window"] = window
    return config


def _refuse_unknown(file: GGUFFile) -> None:
    for name, value in file.metadata.items():
        key = name.removeprefix(f"{file.arch}.")
        if key == name or key in _READ or key in _HARMLESS:
            continue
        if key not in _NEUTRAL or value != _NEUTRAL[key]:
            raise UnsupportedModel(
                f"unsupported GGUF metadata: {name} = {value!r:.100}. It may change what the model computes, "
                "and is not implemented here"
            )


def _num_layers(file: GGUFFile) -> int:
    num_layers = file.integer("block_count")
    if num_layers > len(file.tensors):  # refused before anything of this length is made
        raise ConfigError(f"{file.path}: {file.arch}.block_count is {num_layers}, so weights are missing")
    return num_layers


def _head_dim(file: GGUFFile) -> int:
    computed = file.integer("embedding_length") // max(file.integer("attention.head_count"), 1)
    head_dim = file.integer("attention.key_length", computed)
    if not 0 < head_dim <= MAX_HEAD_DIM:
        raise ConfigError(f"{file.path}: heads of {head_dim}; {MAX_HEAD_DIM} is the limit")
    if file.integer("attention.value_length", computed) != head_dim:
        raise UnsupportedModel(f"unsupported: {file.arch}.attention.value_length other than key_length")
    if file.integer("rope.dimension_count", head_dim) != head_dim:
        raise UnsupportedModel("unsupported: rotation of a part of each head")
    return head_dim


def _sliding_window(file: GGUFFile) -> int | None:
    window = file.integer("attention.sliding_window", 0)
    if window == 0 or window >= file.integer("context_length"):
        return None
    if not FAMILIES[file.arch].permuted:
        raise UnsupportedModel(
            f"unsupported: {file.arch}.attention.sliding_window = {window}, since the file does not say for "
            "which layers"
        )
    return window


def _rope_parameters(file: GGUFFile, head_dim: int) -> dict[str, Any]:
    parameters = {"rope_type": "default", "rope_theta": file.number("rope.freq_base", 10_000.0)}
    # As in llama.cpp, a factor without a type is linear, and 0 means none.
    rope_type = file.text("rope.scaling.type", "linear")
    if rope_type not in ("none", "linear", "yarn"):
        raise UnsupportedModel(f"unsupported: {file.arch}.rope.scaling.type = {rope_type!r:.100}")
    factor = file.number("rope.scaling.factor", file.number("rope.scale_linear", 0.0)) or 1.0
    is_scaled = rope_type != "none" and factor != 1.0
    if ROPE_FREQS in file.tensors:
        if is_scaled:
            raise UnsupportedModel(f"unsupported: {ROPE_FREQS} and {rope_type} scaling of positions together")
        return _llama3_rope(file, parameters["rope_theta"], head_dim)
    if not is_scaled:
        return parameters
    parameters |= {"rope_type": rope_type, "factor": factor}
    if rope_type == "yarn":
        length = file.integer("rope.scaling.original_context_length", file.integer("context_length"))
        parameters["original_max_position_embeddings"] = length
        for name, default in (("beta_fast", 32.0), ("beta_slow", 1.0)):
            parameters[name] = file.number(f"rope.scaling.yarn_{name}", default)
    return parameters


def _llama3_rope(file: GGUFFile, rope_theta: float, head_dim: int) -> dict[str, Any]:
    """Find the parameters of Llama 3's scaling, of which the file has only a divisor for each frequency."""
    divisors = torch.tensor(file.dequantized(ROPE_FREQS))
    if divisors.shape != (head_dim // 2,):  # checked before frequencies of the stated size are computed
        raise UnsupportedModel("unsupported: rotary frequencies other than those of Llama 3")
    plain = rope_frequencies({"rope_type": "default", "rope_theta": rope_theta}, head_dim)
    parameters = {
        "rope_type": "llama3",
        "rope_theta": rope_theta,
        "factor": round(divisors.max().item(), 3),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    expected = plain / rope_frequencies(parameters, head_dim)
    if not torch.allclose(expected, divisors, rtol=1e-3):
        raise UnsupportedModel("unsupported: rotary frequencies other than those of Llama 3")
    return parameters
