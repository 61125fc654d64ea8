"""Computes the frequencies of rotary position embedding, as transformers does.

Frequencies without scaling, with linear scaling and with Llama 3's scaling are computed here in a few lines
each, since importing transformers takes longer than loading a small model. transformers computes those of
YaRN.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ingine.errors import ConfigError, UnsupportedModel

_LENGTH = "original_max_position_embeddings"
SUPPORTED_ROPE = {
    "default": ("rope_theta",),
    "linear": ("rope_theta", "factor"),
    "llama3": ("rope_theta", "factor", "low_freq_factor", "high_freq_factor", _LENGTH),
    "yarn": ("rope_theta", _LENGTH),
}
"""For each `rope_type`, the numbers that its frequencies require.

These frequencies do not depend on the sequence. Those of `dynamic` and `longrope` change with its length: one
request would change another's tokens, and cached keys would become wrong when their sequence grows."""

DEFAULT_THETA = 10_000.0


def rope_parameters(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return what transformers calls `rope_parameters` from a config.json, also from an old one.

    Raises UnsupportedModel for unsupported parameters, KeyError, ValueError or TypeError for wrong ones.
    """
    parameters = dict(raw.get("rope_scaling") or raw.get("rope_parameters") or {})
    if any(isinstance(value, dict) for value in parameters.values()):
        raise UnsupportedModel("unsupported: rope_parameters of several kinds of layers")
    for key, default in (("rope_theta", DEFAULT_THETA), ("partial_rotary_factor", 1.0)):
        parameters.setdefault(key, raw.get(key, default))
    rope_type = parameters.setdefault("rope_type", parameters.get("type", "default"))
    if rope_type not in SUPPORTED_ROPE:
        raise UnsupportedModel(
            f"unsupported rope_type: {rope_type!r:.100} (those that work: {', '.join(SUPPORTED_ROPE)})"
        )
    if parameters["partial_rotary_factor"] != 1.0:
        raise UnsupportedModel("unsupported: partial_rotary_factor")
    if _LENGTH in raw:
        parameters[_LENGTH] = raw[_LENGTH]
    parameters.setdefault(_LENGTH, raw["max_position_embeddings"])
    _check_numbers(parameters)
    return parameters


def _check_numbers(parameters: Mapping[str, Any]) -> None:
    """Raise KeyError or ValueError for wrong numbers: most of them would not fail, but give NaN."""
    rope_type = parameters["rope_type"]
    keys = SUPPORTED_ROPE[rope_type]
    if rope_type == "yarn" and parameters.get("factor") is not None:  # otherwise it follows from the lengths
        keys = (*keys, "factor")
    for key in keys:
        value = parameters[key]
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 < value < math.inf:
            raise ValueError(f"{key} is {value!r:.100}, and no positive number")
    if rope_type == "llama3":
        low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
        if low >= high:
            raise ValueError(f"high_freq_factor is {high}, and not more than low_freq_factor, {low}")


def rope_frequencies(parameters: Mapping[str, Any], head_dim: int) -> Tensor:
    """Return head_dim / 2 angular frequencies for any `rope_parameters` except those of YaRN."""
    inv_freq = 1.0 / parameters["rope_theta"] ** (
        torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    )
    if parameters["rope_type"] == "linear":
        return inv_freq / parameters["factor"]
    if parameters["rope_type"] == "llama3":
        return _llama3(inv_freq, parameters)
    return inv_freq


def yarn_frequencies(folder: Path) -> tuple[Tensor, float]:
    """Return the YaRN frequencies of the model in `folder`, and the factor of its sines and cosines."""
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        return ROPE_INIT_FUNCTIONS["yarn"](config, device=torch.device("cpu"))
    except Exception as error:  # transformers validates with errors of several libraries
        raise ConfigError(f"{folder / 'config.json'}: {error}") from error


def _llama3(inv_freq: Tensor, parameters: Mapping[str, Any]) -> Tensor:
    """Stretch long waves by `factor`, keep short ones, and interpolate between them (Llama 3.1)."""
    factor, length = parameters["factor"], parameters["original_max_position_embeddings"]
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    wavelength = 2 * math.pi / inv_freq
    kept = (length / wavelength - low) / (high - low)
    between = (1 - kept) * inv_freq / factor + kept * inv_freq
    stretched = torch.where(wavelength > length / low, inv_freq / factor, between)
    return torch.where(wavelength < length / high, inv_freq, stretched)
