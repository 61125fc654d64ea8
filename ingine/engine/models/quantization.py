"""Reads `quantization_config` of config.json, which describes weights that another tool has quantised.

The files show which modules are quantised: a module has quantised tensors or a plain weight. So the lists of
excluded modules (`ignore`, `modules_to_not_convert`) are not needed, and no pattern from a model's file is
ever run. Scales must fit one of the schemes here, or the checkpoint is refused.

A key that is not known to be harmless is refused by name: each release of the tools that write these files
adds keys, and some change the meaning of the stored bits.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ingine.errors import ConfigError, UnsupportedModel

Kind = Literal["int4", "int8", "fp8"]

MAX_GROUP = 1 << 24
"""Largest size of a matrix (`_Size` in config.py)."""
_MAX_SCHEMES = 64


@dataclass(frozen=True, slots=True)
class Scheme:
    """How the numbers of a matrix are stored, and which of them share a scale."""

    kind: Kind
    rows: int | None
    """Number of rows that share a scale; None: all rows."""
    columns: int | None
    """Number of columns that share a scale; None: all columns."""
    symmetric: bool = True
    """For int4 of compressed-tensors: if False, zeros must be stored."""
    int8_activations: bool = False
    """Whether the checkpoint is made for activations in int8 too, with a symmetric scale for each token."""


@dataclass(frozen=True, slots=True)
class Quantization:
    method: Literal["awq", "gptq", "compressed-tensors", "fp8"]
    schemes: tuple[Scheme, ...]
    zeros_less_one: bool = False
    """For "gptq": whether a stored zero is one less than its value, as in the first version of the format."""
    desc_act: bool = False
    """For "gptq": columns were quantised in another order than they are stored; `g_idx` has their groups."""


def read_quantization(raw: Mapping[str, Any]) -> Quantization | None:
    """Read the quantization of `raw`, the unchanged config.json; None for weights that are not quantised.

    Raises UnsupportedModel that names what is not supported, or ConfigError for invalid values.
    """
    said = raw.get("quantization_config")
    if not said:
        return None
    if not isinstance(said, dict):
        raise ConfigError(f"config.json: quantization_config is a {type(said).__name__}")
    method = said.get("quant_method")
    read = _METHODS.get(method) if isinstance(method, str) else None
    if read is None:
        raise UnsupportedModel(
            f"unsupported: quantization_config with quant_method {method!r:.100} in config.json "
            f"({', '.join(_METHODS)} work); use the original weights or a GGUF file"
        )
    return read(said)


def unsupported(method: str, what: str, instead: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"unsupported: {method} with {what} (quantization_config in config.json); {instead}"
    )


# -------------------------------------------------------------------------------------------- the methods

_ORIGINAL = "use the original weights or a GGUF file"

# fmt: off
_AWQ_KEYS = {
    "quant_method", "bits", "group_size", "zero_point", "version", "format", "backend",
    "modules_to_not_convert", "do_fuse", "fuse_max_seq_len", "modules_to_fuse", "exllama_config",
    # Written by GPTQModel:
    "method", "checkpoint_format", "pack_dtype", "dynamic", "adapter", "activation", "rotation", "desc_act",
    "sym", "lm_head", "meta",
}
_GPTQ_KEYS = {
    "quant_method", "bits", "group_size", "desc_act", "sym", "checkpoint_format", "format", "pack_dtype",
    "is_marlin_format", "dynamic", "adapter", "activation", "rotation", "lm_head", "method",
    # How the weights were quantised, or which kernel multiplies them:
    "meta", "quantizer", "damp_percent", "damp_auto_increment", "static_groups", "true_sequential",
    "act_group_aware", "mse", "dataset", "tokenizer", "model_name_or_path", "model_file_base_name",
    "model_seqlen", "block_name_to_quantize", "module_name_preceding_first_block", "batch_size",
    "pad_token_id", "max_input_length", "use_cuda_fp16", "use_exllama", "disable_exllama", "exllama_config",
    "cache_block_outputs", "modules_in_block_to_quantize", "backend", "offload_to_disk", "pack_impl",
    "awq_gemm_checkpoint", "modules_to_not_convert",
}
_FP8_KEYS = {
    "quant_method", "activation_scheme", "weight_block_size", "fmt", "scale_fmt", "modules_to_not_convert",
    "ignored_layers", "dequantize",
}
_COMPRESSED_KEYS = {
    "quant_method", "config_groups", "format", "quantization_status", "global_compression_ratio", "ignore",
    "version", "kv_cache_scheme", "sparsity_config", "transform_config",
}
_GROUP_KEYS = {"targets", "weights", "input_activations", "output_activations", "format"}
_ARGUMENT_KEYS = {
    "num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "dynamic", "actorder",
    "observer", "observer_kwargs", "scale_dtype", "zp_dtype",
}
# fmt: on


def _awq(said: dict[str, Any]) -> Quantization:
    _refuse_unknown("AWQ", said, _AWQ_KEYS)
    _require("AWQ", said, "bits", (4,))
    _refuse_additions("AWQ", said)
    layouts = [said[key] for key in ("version", "format", "checkpoint_format") if said.get(key)]
    if said.get("backend") == "llm-awq":
        layouts.append("llm-awq")
    for layout in layouts:
        if not isinstance(layout, str) or layout.lower() != "gemm":
            raise unsupported("AWQ", f"version {layout!r:.100}", "AutoAWQ writes the one that works: 'gemm'")
    _require("AWQ", said, "zero_point", (True, None))
    return Quantization("awq", (_grouped("int4", said),))


def _gptq(said: dict[str, Any]) -> Quantization:
    _refuse_unknown("GPTQ", said, _GPTQ_KEYS)
    _require("GPTQ", said, "bits", (4,))
    _refuse_additions("GPTQ", said)
    _require("GPTQ", said, "is_marlin_format", (False, None))
    layout = said.get("checkpoint_format") or said.get("format") or "gptq"
    if layout not in ("gptq", "gptq_v2"):
        raise unsupported("GPTQ", f"checkpoint_format {layout!r:.100}", "'gptq' and 'gptq_v2' work")
    _require("GPTQ", said, "desc_act", (True, False, None))
    return Quantization(
        "gptq", (_grouped("int4", said),), layout == "gptq", desc_act=said.get("desc_act") is True
    )


def _refuse_additions(method: str, said: dict[str, Any]) -> None:
    """Refuse extensions that GPTQModel may add to either method."""
    _require(method, said, "pack_dtype", ("int32", None))
    _require(method, said, "dynamic", (None, False, {}))  # other bits for some modules
    for key in ("adapter", "activation", "rotation"):
        _require(method, said, key, (None, {}))


def _fp8(said: dict[str, Any]) -> Quantization:
    _refuse_unknown("fp8", said, _FP8_KEYS)
    _require("fp8", said, "fmt", ("e4m3", "float8_e4m3fn", None))
    _require("fp8", said, "activation_scheme", ("dynamic", "static", None))
    block = said.get("weight_block_size")
    if block is None:
        return Quantization("fp8", (Scheme("fp8", None, None), Scheme("fp8", 1, None)))
    return Quantization("fp8", (Scheme("fp8", *_block("fp8", block)),))


def _compressed(said: dict[str, Any]) -> Quantization:
    _refuse_unknown("compressed-tensors", said, _COMPRESSED_KEYS)
    _require("compressed-tensors", said, "kv_cache_scheme", (None, {}))
    _require("compressed-tensors", said, "transform_config", (None, {}))
    sparsity = said.get("sparsity_config")
    if sparsity and not (isinstance(sparsity, dict) and sparsity.get("format") == "dense"):
        raise unsupported("compressed-tensors", f"sparsity_config {sparsity!r:.100}", _ORIGINAL)
    groups = said.get("config_groups")
    if not isinstance(groups, dict) or not 0 < len(groups) <= _MAX_SCHEMES:
        raise ConfigError("config.json: quantization_config has no config_groups, or too many")
    schemes = (_compressed_group(group, said.get("format")) for group in groups.values())
    return Quantization("compressed-tensors", tuple(dict.fromkeys(schemes)))


_METHODS: dict[str, Callable[[dict[str, Any]], Quantization]] = {
    "awq": _awq,
    "gptq": _gptq,
    "compressed-tensors": _compressed,
    "fp8": _fp8,
}

_FORMATS: dict[Kind, tuple[str, ...]] = {
    "int4": ("pack-quantized",),
    "int8": ("int-quantized", "naive-quantized", "pack-quantized"),
    "fp8": ("float-quantized", "naive-quantized"),
}


def _compressed_group(group: Any, default_format: Any) -> Scheme:
    if not isinstance(group, dict):
        raise unsupported("compressed-tensors", "a scheme that is a name in config_groups", _ORIGINAL)
    _refuse_unknown("compressed-tensors", group, _GROUP_KEYS)
    weights, inputs = (_arguments(group.get(key)) for key in ("weights", "input_activations"))
    _require("compressed-tensors", group, "output_activations", (None,))
    numbers = (weights.get("type", "int"), weights.get("num_bits", 8))
    kind: Kind | None = {("int", 4): "int4", ("int", 8): "int8", ("float", 8): "fp8"}.get(numbers)
    layout = group.get("format") or default_format
    if kind is None or layout not in _FORMATS[kind]:
        raise unsupported(
            "compressed-tensors",
            f"format {layout!r:.100} and weights of type {numbers[0]!r:.100}, {numbers[1]!r:.100} bits",
            "'pack-quantized' int4 and int8, 'int-quantized' int8 and 'float-quantized' fp8 work",
        )
    _require("compressed-tensors", weights, "dynamic", (False, None))
    _require(
        "compressed-tensors", weights, "symmetric", (True, False, None) if kind == "int4" else (True, None)
    )
    takes_int8 = tuple(inputs.get(key) for key in ("type", "num_bits", "dynamic")) == ("int", 8, True)
    per_token = inputs.get("strategy") == "token" and inputs.get("symmetric") is True
    rows, columns = _compressed_block(weights)
    symmetric = weights.get("symmetric") is not False
    return Scheme(kind, rows, columns, symmetric, int8_activations=takes_int8 and per_token)


def _arguments(said: Any) -> dict[str, Any]:
    """Return the arguments of weights or activations; {} if these are not quantised."""
    if said is None:
        return {}
    if not isinstance(said, dict):
        raise ConfigError(f"config.json: quantization_config has arguments that are a {type(said).__name__}")
    _refuse_unknown("compressed-tensors", said, _ARGUMENT_KEYS)
    if unhashable := [key for key in ("type", "num_bits") if isinstance(said.get(key), (dict, list))]:
        raise ConfigError(
            f"config.json: quantization_config: {unhashable[0]} is {said[unhashable[0]]!r:.100}"
        )
    return said


def _compressed_block(weights: dict[str, Any]) -> tuple[int | None, int | None]:
    strategy = weights.get("strategy")
    if strategy is None:  # as compressed-tensors infers it
        group_size = weights.get("group_size")
        strategy = "tensor" if group_size is None else "channel" if group_size == -1 else "group"
    match strategy:
        case "tensor":
            return None, None
        case "channel":
            return 1, None
        case "group":
            return 1, _size("compressed-tensors", "group_size", weights.get("group_size"))
        case "block":
            return _block("compressed-tensors", weights.get("block_structure"))
    raise unsupported("compressed-tensors", f"strategy {strategy!r:.100} for weights", _ORIGINAL)


# ----------------------------------------------------------------------------------------------- values


def _grouped(kind: Kind, said: dict[str, Any]) -> Scheme:
    group_size = said.get("group_size", 128)
    whole_row = isinstance(group_size, int) and group_size == -1
    return Scheme(kind, 1, None if whole_row else _size(kind, "group_size", group_size))


def _block(method: str, said: Any) -> tuple[int, int]:
    if isinstance(said, str) and len(said) <= 20:  # "128x128", in older files of compressed-tensors
        said = [int(size) if size.isascii() and size.isdecimal() else None for size in said.split("x")]
    if not isinstance(said, list) or len(said) != 2:
        raise ConfigError(f"config.json: {method}: blocks of weights are {said!r:.100}, not two sizes")
    rows, columns = (_size(method, "a block's size", size) for size in said)
    return rows, columns


def _size(method: str, name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= MAX_GROUP:
        raise ConfigError(f"config.json: quantization_config: {method}: {name} is {value!r:.100}")
    return value


def _require(method: str, said: Mapping[str, Any], key: str, allowed: tuple[Any, ...]) -> None:
    value = said.get(key)
    if not any(value == one and type(value) is type(one) for one in allowed):
        works = " or ".join(repr(one) for one in allowed if one is not None) or "none"
        raise unsupported(method, f"{key} = {value!r:.100}", f"{works} works; otherwise {_ORIGINAL}")


def _refuse_unknown(method: str, said: Mapping[str, Any], known: set[str]) -> None:
    if unknown := said.keys() - known:
        name = min(unknown)
        raise unsupported(method, f"{name!r:.100}, which nothing here knows", _ORIGINAL)
