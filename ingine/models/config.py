"""What the engine needs to know of a model, read from a Hugging Face folder once and never changed."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ingine.errors import ConfigError, UnsupportedModel
from ingine.models.registry import ArchitectureOptions, find_architecture

SUPPORTED_ROPE = ("default", "linear", "llama3", "yarn")
"""Frequencies that do not depend on the sequence. `dynamic` and `longrope` change with its length: one
request would change another's tokens, and cached keys would be wrong once their sequence had grown."""


@dataclass(frozen=True)
class ModelConfig:
    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    """Most tokens of a sequence, the scaling of rotary positions included."""
    rope_inv_freq: tuple[float, ...]
    """head_dim / 2 angular frequencies, scaling included."""
    rope_attention_scaling: float
    sliding_windows: tuple[int | None, ...]
    """One a layer: how many tokens it sees, itself included; None for all."""
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    qk_norm: bool
    eos_token_ids: tuple[int, ...]
    """From config.json and generation_config.json; empty where neither names one."""
    dtype: torch.dtype
    """Of the checkpoint."""

    @classmethod
    def from_folder(cls, path: Path) -> "ModelConfig":
        """Raises ConfigError (config.json is missing or wrong) or UnsupportedModel (it is beyond us)."""
        raw = read_json(path / "config.json")
        architecture, options = find_architecture(raw.get("architectures") or [])
        try:
            hf_config = AutoConfig.from_pretrained(path)
        except Exception as error:  # transformers validates with errors of several libraries
            raise ConfigError(f"{path / 'config.json'}: {error}") from error
        _refuse_unsupported(hf_config)

        num_heads = hf_config.num_attention_heads
        num_kv_heads = getattr(hf_config, "num_key_value_heads", None) or num_heads
        if num_heads % num_kv_heads:
            raise ConfigError(f"{path}: {num_heads} heads cannot share {num_kv_heads} key/value heads evenly")
        head_dim = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // num_heads
        inv_freq, attention_scaling = _rope(hf_config, head_dim)
        attention_bias = options.attention_bias == "config" and hf_config.attention_bias
        return cls(
            architecture=architecture,
            vocab_size=hf_config.vocab_size,
            hidden_size=hf_config.hidden_size,
            intermediate_size=hf_config.intermediate_size,
            num_layers=hf_config.num_hidden_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rms_norm_eps=hf_config.rms_norm_eps,
            max_position_embeddings=_max_position_embeddings(hf_config),
            rope_inv_freq=inv_freq,
            rope_attention_scaling=attention_scaling,
            sliding_windows=_sliding_windows(hf_config, options),
            tie_word_embeddings=hf_config.tie_word_embeddings,
            qkv_bias=options.attention_bias == "qkv" or attention_bias,
            output_bias=attention_bias,
            qk_norm=options.qk_norm,
            eos_token_ids=_eos_token_ids(path, raw),
            dtype=hf_config.dtype or torch.float32,
        )


def read_json(path: Path) -> dict[str, Any]:
    """Raises ConfigError where there is no such file, or something else than a JSON object in it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds no JSON object")
    return content


def _refuse_unsupported(hf_config: PretrainedConfig) -> None:
    """A feature that the decoder would silently leave out gives wrong tokens: better none."""
    if getattr(hf_config, "quantization_config", None):
        raise UnsupportedModel("unsupported: quantised safetensors; use the original weights or a GGUF file")
    if hf_config.hidden_act != "silu":
        raise UnsupportedModel(f"unsupported hidden_act: {hf_config.hidden_act} (silu works)")
    if getattr(hf_config, "mlp_bias", False):
        raise UnsupportedModel("unsupported: mlp_bias")


def _rope(hf_config: PretrainedConfig, head_dim: int) -> tuple[tuple[float, ...], float]:
    parameters = hf_config.rope_parameters
    rope_type = parameters.get("rope_type", "default")
    if rope_type not in SUPPORTED_ROPE:
        raise UnsupportedModel(
            f"unsupported rope_type: {rope_type} (those that work: {', '.join(SUPPORTED_ROPE)})"
        )
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedModel("unsupported: partial_rotary_factor")
    if rope_type == "default":
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        return tuple((1.0 / parameters["rope_theta"] ** exponents).tolist()), 1.0
    inv_freq, attention_scaling = ROPE_INIT_FUNCTIONS[rope_type](hf_config, device=torch.device("cpu"))
    return tuple(inv_freq.tolist()), attention_scaling


def _max_position_embeddings(hf_config: PretrainedConfig) -> int:
    """As vLLM has it: `yarn` and `linear` stretch what the model was trained for by their factor. Llama 3's
    configs name the stretched length.
    """
    parameters, length = hf_config.rope_parameters, hf_config.max_position_embeddings
    rope_type, factor = parameters.get("rope_type"), parameters.get("factor")
    if rope_type not in ("linear", "yarn") or factor is None:  # None: transformers takes it from the lengths
        return length
    if rope_type == "yarn":
        length = parameters.get("original_max_position_embeddings") or length
    return int(length * factor)


def _sliding_windows(hf_config: PretrainedConfig, options: ArchitectureOptions) -> tuple[int | None, ...]:
    if options.sliding_window == "never":
        return (None,) * hf_config.num_hidden_layers
    if options.sliding_window == "every_layer":
        return (hf_config.sliding_window,) * hf_config.num_hidden_layers
    sliding = [layer_type == "sliding_attention" for layer_type in hf_config.layer_types]
    return tuple(hf_config.sliding_window if slides else None for slides in sliding)


def _eos_token_ids(path: Path, raw: dict[str, Any]) -> tuple[int, ...]:
    generation = path / "generation_config.json"
    named = [raw.get("eos_token_id")]
    if generation.exists():
        named.append(read_json(generation).get("eos_token_id"))
    token_ids = [token_id for value in named for token_id in (value if isinstance(value, list) else [value])]
    return tuple(dict.fromkeys(token_id for token_id in token_ids if token_id is not None))
