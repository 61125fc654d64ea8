"""Refuses keys of config.json that change what a model computes, and that the decoder does not implement.

config.json is read as transformers' class for the architecture reads it. A key that this class does not know
has no effect there and is ignored here too, since fine-tunes add keys of all kinds. But a key in the table
below means that the model computes something else than transformers would. It is refused, unless its value
says that the model does not use the feature.
"""

from collections.abc import Mapping
from typing import Any

from ingine.errors import UnsupportedModel

_NOTHING = (None, False, 0, "", [], {})
_ONE = (None, 1)

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    # scaling, capping or clipping of intermediate numbers
    **dict.fromkeys(("logit_scale", "logits_scaling", "lm_head_multiplier", "embedding_multiplier"), _ONE),
    **dict.fromkeys(("residual_multiplier", "residual_scale", "scale_emb", "embedding_scale"), _ONE),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping", "clip_qkv"), _NOTHING),
    **dict.fromkeys(("attention_multiplier", "query_pre_attn_scalar", "attn_temperature_tuning"), _NOTHING),
    # other attention
    **dict.fromkeys(("use_qk_norm", "qk_norm", "qk_layernorm", "alibi", "use_alibi"), _NOTHING),
    **dict.fromkeys(("attention_chunk_size", "dual_chunk_attention_config"), _NOTHING),
    **dict.fromkeys(("add_cross_attention", "is_encoder_decoder", "use_bidirectional_attention"), _NOTHING),
    **dict.fromkeys(("sliding_window_pattern", "num_kv_shared_layers"), _NOTHING),
    "is_causal": (None, True),
    # other positions; `partial_rotary_factor` and types of scaling are in rope.py
    **dict.fromkeys(("rope_interleaved", "rope_local_base_freq", "no_rope_layer_interval"), _NOTHING),
    **dict.fromkeys(("rotary_pct", "rotary_emb_fraction"), _ONE),
    # other layers
    **dict.fromkeys(("mlp_bias", "use_parallel_residual", "parallel_residual"), _NOTHING),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), _NOTHING),
    # weights that are not plain numbers
    **dict.fromkeys(("compression_config", "quantization"), _NOTHING),
}
"""For each key, the values that mean that the model does not use the feature."""


def refuse_unsupported(raw: Mapping[str, Any]) -> None:
    """Raise UnsupportedModel that names a key which is not supported. `raw` is the unchanged config.json."""
    for key, neutral in _NEUTRAL.items():
        if key in raw and raw[key] not in neutral:
            raise UnsupportedModel(
                f"unsupported: {key} = {raw[key]!r:.100} in config.json. It is not implemented here, and "
                "without it the model gives other tokens"
            )
    no_rope = raw.get("no_rope_layers")
    if isinstance(no_rope, list) and not all(no_rope):  # 1 for a layer that has positions
        raise UnsupportedModel("unsupported: no_rope_layers in config.json, layers without positions")
