"""The configuration of a model, which is read once from a Hugging Face folder and does not change."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ingine.engine.files.model_files import read_json
from ingine.engine.models.config_keys import refuse_unsupported
from ingine.engine.models.quantization import Quantization, read_quantization
from ingine.engine.models.registry import ARCHITECTURES, ArchitectureOptions, find_architecture
from ingine.engine.models.rope import rope_frequencies, rope_parameters, yarn_frequencies
from ingine.errors import ConfigError, UnsupportedModel

FULL, SLIDING = "full_attention", "sliding_attention"
_Checked = TypeVar("_Checked", bound=BaseModel)

MAX_LENGTH = (1 << 31) - 1
"""Largest length of a sequence or a window that the kernels can count."""
MAX_HEAD_DIM = 1 << 14
# At least ten times what any model has. Larger values are a mistake or an attack, and are refused before a
# list of so many layers or a product of such sizes is made for the comparison with the weights.
_Layers = Annotated[int, Field(gt=0, le=4096)]
_Heads = Annotated[int, Field(gt=0, le=1 << 14)]
_Size = Annotated[int, Field(gt=0, le=1 << 24)]
_Length = Annotated[int, Field(gt=0, le=MAX_LENGTH)]
_Words = Annotated[list[str], Field(fail_fast=True)]
_TokenIds = Annotated[list[int], Field(fail_fast=True)]


class _Names(BaseModel):
    """Keys that are read from the file itself, since transformers would fill in a family's defaults."""

    model_config = ConfigDict(strict=True, protected_namespaces=())

    architectures: _Words | None = None
    model_type: str | None = None
    num_hidden_layers: _Layers | None = None
    """Checked before transformers makes a list of this length."""
    eos_token_id: int | _TokenIds | None = None
    """Also read from generation_config.json."""


class _HFConfig(BaseModel):
    """The keys of config.json that are read. A key without a default has a default that differs by family."""

    model_config = ConfigDict(strict=True, protected_namespaces=())

    vocab_size: _Size
    hidden_size: _Size
    intermediate_size: _Size
    num_hidden_layers: _Layers
    num_attention_heads: _Heads
    num_key_value_heads: _Heads | None
    max_position_embeddings: _Length
    rms_norm_eps: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    head_dim: Annotated[int, Field(gt=0, le=MAX_HEAD_DIM)] | None = None
    hidden_act: str = "silu"
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    use_sliding_window: bool = False
    sliding_window: _Length | None = None
    layer_types: _Words | None = None
    dtype: str | None = None
    torch_dtype: str | None = None


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
    """Most tokens of a sequence, including the scaling of rotary positions."""
    rope_inv_freq: tuple[float, ...]
    """head_dim / 2 angular frequencies, including scaling."""
    rope_attention_scaling: float
    sliding_windows: tuple[int | None, ...]
    """For each layer, how many tokens a token sees, including itself; None: all."""
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    qk_norm: bool
    eos_token_ids: tuple[int, ...]
    """From config.json and generation_config.json; empty if neither names one."""
    dtype: torch.dtype
    """The dtype of the checkpoint."""
    quantization: Quantization | None = None
    """How another tool has quantised the checkpoint's weights; None: they are plain, or in a GGUF file."""

    @property
    def model_type(self) -> str:
        """The name of the architecture in transformers: `model_type` of config.json."""
        return ARCHITECTURES[self.architecture].model_type

    @classmethod
    def from_folder(cls, path: Path) -> "ModelConfig":
        """Read the folder `path`. Raises ConfigError if config.json is missing or wrong, UnsupportedModel if
        the model is not supported.
        """
        file = path / "config.json"
        raw = read_json(file)
        names = _checked(_Names, raw, file)
        architecture, options = find_architecture(names.architectures or [], own_code=raw.get("auto_map"))
        if names.model_type not in (None, options.model_type):
            raise UnsupportedModel(
                f"unsupported: {architecture} with model_type {names.model_type!r:.100}; it goes with "
                f"{options.model_type}"
            )
        refuse_unsupported(raw)
        values = raw if _says_all(raw, options) else _completed(path)
        config = _checked(_HFConfig, values, file)
        if config.hidden_act != "silu":
            raise UnsupportedModel(f"unsupported hidden_act: {config.hidden_act!r:.100} (silu works)")

        num_heads = config.num_attention_heads
        num_kv_heads = config.num_key_value_heads or num_heads
        if num_heads % num_kv_heads:
            raise ConfigError(f"{path}: {num_heads} heads cannot share {num_kv_heads} key/value heads evenly")
        head_dim = _head_dim(config, file)
        try:
            rope = rope_parameters(values)
            inv_freq, attention_scaling = _frequencies(rope, head_dim, path)
            max_position_embeddings = _max_position_embeddings(config, rope)
        except (
            KeyError,
            TypeError,
            ValueError,
            OverflowError,
            RuntimeError,
        ) as error:  # RuntimeError: torch's
            raise ConfigError(f"{file}: wrong parameters of rotary positions: {error!r:.300}") from error
        attention_bias = options.attention_bias == "config" and config.attention_bias
        return cls(
            architecture=architecture,
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_layers=config.num_hidden_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rms_norm_eps=config.rms_norm_eps,
            max_position_embeddings=max_position_embeddings,
            rope_inv_freq=tuple(inv_freq.tolist()),
            rope_attention_scaling=attention_scaling,
            sliding_windows=_sliding_windows(config, options, file),
            tie_word_embeddings=config.tie_word_embeddings,
            qkv_bias=options.attention_bias == "qkv" or attention_bias,
            output_bias=attention_bias,
            qk_norm=options.qk_norm,
            eos_token_ids=_eos_token_ids(path, names, config.vocab_size),
            dtype=_dtype(config, file),
            quantization=read_quantization(raw),
        )


def _checked(model: type[_Checked], values: dict[str, Any], file: Path) -> _Checked:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        where = ".".join(map(str, fault["loc"]))
        given = "" if fault["type"] == "missing" else f", not {fault['input']!r:.100}"
        raise ConfigError(f"{file}: {where}: {fault['msg']}{given}") from None


def _says_all(raw: dict[str, Any], options: ArchitectureOptions) -> bool:
    """Return whether config.json leaves nothing to the defaults of a family, which only transformers knows.
    Nearly every config.json is complete, and importing transformers takes longer than loading a small model.
    """
    if options.sliding_window == "layer_types" and raw.get("use_sliding_window"):
        return False  # transformers decides in which layers
    needed = {name for name, field in _HFConfig.model_fields.items() if field.is_required()}
    if options.qk_norm:
        needed.add("head_dim")
    if options.sliding_window == "every_layer":
        needed.add("sliding_window")
    return needed <= raw.keys()


def _completed(path: Path) -> dict[str, Any]:
    from transformers import AutoConfig

    try:
        # `auto_map` may name code in the folder: use only classes of transformers itself.
        return AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True).to_dict()
    except Exception as error:  # transformers validates with errors of several libraries
        raise ConfigError(f"{path / 'config.json'}: {error}") from error


def _head_dim(config: _HFConfig, file: Path) -> int:
    num_heads = config.num_attention_heads
    if config.head_dim is None and config.hidden_size % num_heads:
        raise ConfigError(
            f"{file}: hidden_size {config.hidden_size} is no multiple of its {num_heads} heads, and there is "
            "no head_dim"
        )
    head_dim = config.head_dim or config.hidden_size // num_heads
    if head_dim > MAX_HEAD_DIM:
        raise ConfigError(f"{file}: heads of {head_dim}; {MAX_HEAD_DIM} is the limit")
    if head_dim % 2:
        raise ConfigError(f"{file}: heads of {head_dim} have no halves for rotary positions to rotate")
    return head_dim


def _frequencies(rope: dict[str, Any], head_dim: int, path: Path) -> tuple[torch.Tensor, float]:
    if rope["rope_type"] == "yarn":
        inv_freq, attention_scaling = yarn_frequencies(path)
    else:
        inv_freq, attention_scaling = rope_frequencies(rope, head_dim), 1.0
    if inv_freq.shape != (head_dim // 2,) or not inv_freq.isfinite().all():
        raise ValueError("they give no frequency for each half of a head")
    if not math.isfinite(attention_scaling):
        raise ValueError(f"sines would be multiplied by {attention_scaling}")
    return inv_freq, attention_scaling


def _max_position_embeddings(config: _HFConfig, rope: dict[str, Any]) -> int:
    """Return the most tokens of a sequence, as vLLM does: `yarn` and `linear` multiply the trained length by
    their factor. Configs of Llama 3 state the scaled length.
    """
    length, factor = config.max_position_embeddings, rope.get("factor")
    if rope["rope_type"] not in ("linear", "yarn") or factor is None:  # None: taken from the lengths
        return length
    if rope["rope_type"] == "yarn":
        length = rope["original_max_position_embeddings"]
    scaled = int(length * factor)
    if not 0 < scaled <= MAX_LENGTH:
        raise ValueError(f"{length} positions by a factor of {factor}")
    return scaled


def _sliding_windows(config: _HFConfig, options: ArchitectureOptions, file: Path) -> tuple[int | None, ...]:
    num_layers = config.num_hidden_layers
    if options.sliding_window == "never":
        return (None,) * num_layers
    if config.layer_types is None:
        slides = options.sliding_window == "every_layer"
        return (config.sliding_window if slides else None,) * num_layers
    if len(config.layer_types) != num_layers:
        raise ConfigError(f"{file}: layer_types names {len(config.layer_types)} layers of {num_layers}")
    if unknown := set(config.layer_types) - {FULL, SLIDING}:
        raise UnsupportedModel(f"unsupported: layers of {', '.join(sorted(unknown))} in layer_types")
    if options.sliding_window == "layer_types" and not config.use_sliding_window:
        if SLIDING in config.layer_types:
            raise ConfigError(f"{file}: layer_types has {SLIDING}, but use_sliding_window is not set")
        return (None,) * num_layers
    return tuple(config.sliding_window if kind == SLIDING else None for kind in config.layer_types)


def _dtype(config: _HFConfig, file: Path) -> torch.dtype:
    name = config.dtype or config.torch_dtype or "float32"
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(f"{file}: dtype {name!r} is none of torch's")
    return dtype


def _eos_token_ids(path: Path, names: _Names, vocab_size: int) -> tuple[int, ...]:
    """Return the named ids that are in the vocabulary: -1, for example, means that there is none."""
    generation = path / "generation_config.json"
    named = [names.eos_token_id]
    if generation.exists():
        named.append(_checked(_Names, read_json(generation), generation).eos_token_id)
    token_ids = [token_id for value in named for token_id in (value if isinstance(value, list) else [value])]
    return tuple(
        dict.fromkeys(
            token_id for token_id in token_ids if token_id is not None and 0 <= token_id < vocab_size
        )
    )
