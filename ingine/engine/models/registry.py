"""Which architectures run here, and how they differ: one row an architecture."""

from dataclasses import dataclass
from typing import Any, Literal

from ingine.errors import UnsupportedModel


@dataclass(frozen=True)
class ArchitectureOptions:
    model_type: str
    """In config.json; transformers chooses its class by it."""
    attention_bias: Literal["never", "qkv", "config"]
    """Which attention projections have one; `config`: all four, if config.json's `attention_bias` is set."""
    sliding_window: Literal["never", "every_layer", "layer_types"]
    """Where config.json's `sliding_window` counts, if it has one. `every_layer`: unless by `layer_types`."""
    qk_norm: bool = False
    """Each query and key head is normalised before its rotation."""


ARCHITECTURES: dict[str, ArchitectureOptions] = {
    "LlamaForCausalLM": ArchitectureOptions("llama", "config", "never"),  # also SmolLM and SmolLM2
    "MistralForCausalLM": ArchitectureOptions("mistral", "never", "every_layer"),
    "Qwen2ForCausalLM": ArchitectureOptions("qwen2", "qkv", "layer_types"),  # also Qwen2.5
    "Qwen3ForCausalLM": ArchitectureOptions("qwen3", "config", "layer_types", qk_norm=True),
}


def find_architecture(names: list[str], *, own_code: Any = None) -> tuple[str, ArchitectureOptions]:
    """The first of a config's `architectures` that runs here. Raises UnsupportedModel.

    `own_code` is config.json's `auto_map`, which names code that the model brings along, for the message.
    """
    for name in names:
        if name in ARCHITECTURES:
            return name, ARCHITECTURES[name]
    given = f"{', '.join(names):.200}" or "config.json names no architecture"
    code = f". Code that a model brings along ({own_code!r:.100}) is never run here" if own_code else ""
    raise UnsupportedModel(
        f"unsupported architecture: {given}. Those that work: {', '.join(ARCHITECTURES)}{code}"
    )
