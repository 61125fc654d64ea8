"""The supported architectures and their differences, one row for each."""

from dataclasses import dataclass
from typing import Any, Literal

from ingine.errors import UnsupportedModel


@dataclass(frozen=True)
class ArchitectureOptions:
    model_type: str
    """`model_type` of config.json, by which transformers chooses its class."""
    attention_bias: Literal["never", "qkv", "config"]
    """The attention projections with a bias; `config`: all four, if config.json sets `attention_bias`."""
    sliding_window: Literal["never", "every_layer", "layer_types"]
    """The layers where config.json's `sliding_window` applies. `every_layer`: unless it has `layer_types`."""
    qk_norm: bool = False
    """Whether each query and key head is normalised before its rotation."""


ARCHITECTURES: dict[str, ArchitectureOptions] = {
    "LlamaForCausalLM": ArchitectureOptions("llama", "config", "never"),  # also SmolLM and SmolLM2
    "MistralForCausalLM": ArchitectureOptions("mistral", "never", "every_layer"),
    "Qwen2ForCausalLM": ArchitectureOptions("qwen2", "qkv", "layer_types"),  # also Qwen2.5
    "Qwen3ForCausalLM": ArchitectureOptions("qwen3", "config", "layer_types", qk_norm=True),
}


def find_architecture(names: list[str], *, own_code: Any = None) -> tuple[str, ArchitectureOptions]:
    """Return the first supported one of a config's `architectures`. Raises UnsupportedModel if there is none.

    own_code: config.json's `auto_map`, which names code in the model's folder, for the message.
    """
    for name in names:
        if name in ARCHITECTURES:
            return name, ARCHITECTURES[name]
    given = f"{', '.join(names):.200}" or "config.json names no architecture"
    code = f". Code that a model brings along ({own_code!r:.100}) is never run here" if own_code else ""
    raise UnsupportedModel(
        f"unsupported architecture: {given}. Those that work: {', '.join(ARCHITECTURES)}{code}"
    )
