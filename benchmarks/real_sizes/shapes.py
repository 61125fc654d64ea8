"""The shapes of models that people serve, and their tensors by the names of Hugging Face and of GGUF."""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """A Qwen2 decoder: biases at query, key and value, as Qwen2.5's config.json says."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    tied: bool
    """True if the output matrix is the embedding."""
    max_position_embeddings: int = 32_768
    rope_theta: float = 1_000_000.0
    rms_norm_eps: float = 1e-6

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of KV per token, in bfloat16."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * 2


SHAPES = {
    "1.5b": Shape("Qwen2.5-1.5B", 1536, 8960, 28, 12, 2, 151_936, tied=True),
    "7b": Shape("Qwen2.5-7B", 3584, 18_944, 28, 28, 4, 152_064, tied=False),
}


@dataclass(frozen=True)
class TensorSpec:
    gguf_name: str
    hf_name: str
    shape: tuple[int, ...]
    """Shape with rows first, as in torch."""
    layer: int | None = None


def tensors(shape: Shape) -> Iterator[TensorSpec]:
    hidden, inner, kv = shape.hidden_size, shape.intermediate_size, shape.num_kv_heads * shape.head_dim
    yield TensorSpec("token_embd.weight", "model.embed_tokens.weight", (shape.vocab_size, hidden))
    for layer in range(shape.num_layers):
        for gguf_name, hf_name, size in (
            ("attn_norm.weight", "input_layernorm.weight", (hidden,)),
            ("attn_q.weight", "self_attn.q_proj.weight", (hidden, hidden)),
            ("attn_q.bias", "self_attn.q_proj.bias", (hidden,)),
            ("attn_k.weight", "self_attn.k_proj.weight", (kv, hidden)),
            ("attn_k.bias", "self_attn.k_proj.bias", (kv,)),
            ("attn_v.weight", "self_attn.v_proj.weight", (kv, hidden)),
            ("attn_v.bias", "self_attn.v_proj.bias", (kv,)),
            ("attn_output.weight", "self_attn.o_proj.weight", (hidden, hidden)),
            ("ffn_norm.weight", "post_attention_layernorm.weight", (hidden,)),
            ("ffn_gate.weight", "mlp.gate_proj.weight", (inner, hidden)),
            ("ffn_up.weight", "mlp.up_proj.weight", (inner, hidden)),
            ("ffn_down.weight", "mlp.down_proj.weight", (hidden, inner)),
        ):
            yield TensorSpec(f"blk.{layer}.{gguf_name}", f"model.layers.{layer}.{hf_name}", size, layer)
    yield TensorSpec("output_norm.weight", "model.norm.weight", (hidden,))
    if not shape.tied:
        yield TensorSpec("output.weight", "lm_head.weight", (shape.vocab_size, hidden))
