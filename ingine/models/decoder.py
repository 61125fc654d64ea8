"""The decoder: Llama, SmolLM, Mistral, Qwen2 and Qwen3 are one model with a few switches.

Tokens of all sequences of a step come packed along one dimension, T; only attention knows where one sequence
ends. Run it under `torch.inference_mode()`.
"""

import torch
from torch import Tensor, nn

from ingine.attention import AttentionMetadata, KVCache
from ingine.kernels import Kernels
from ingine.layers.linear import Linear
from ingine.layers.norm import RMSNorm
from ingine.layers.rotary import RotaryEmbedding
from ingine.layers.weights import Embedding, embedding
from ingine.models.config import ModelConfig


class Attention(nn.Module):
    def __init__(
        self,
        config: ModelConfig,
        kernels: Kernels,
        sliding_window: int | None,
        dtype: torch.dtype,
        device: torch.device,
    ):
        super().__init__()
        self.backend = kernels.attention
        self.sliding_window = sliding_window
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim = config.head_dim
        self.scale = config.head_dim**-0.5
        q_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        factory = {"dtype": dtype, "device": device}
        self.qkv_proj = Linear(
            config.hidden_size, [q_size, kv_size, kv_size], bias=config.qkv_bias, **factory
        )
        self.o_proj = Linear(q_size, [config.hidden_size], bias=config.output_bias, **factory)
        self.q_norm = self.k_norm = None
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps, kernels.ops, **factory)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps, kernels.ops, **factory)

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], kv_cache: KVCache, metadata: AttentionMetadata
    ) -> Tensor:
        heads = self.qkv_proj(x).view(len(x), -1, self.head_dim)
        query, key, value = heads.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
        if self.q_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        attended = self.backend.forward(
            query,
            key,
            value,
            kv_cache,
            metadata,
            scale=self.scale,
            sliding_window=self.sliding_window,
            rotation=rotation,
        )
        return self.o_proj(attended.flatten(1))

    def checkpoint_tensors(self, prefix: str) -> dict[str, Tensor]:
        tensors = self.qkv_proj.parts([f"{prefix}.{name}_proj" for name in "qkv"])
        tensors |= self.o_proj.parts([f"{prefix}.o_proj"])
        if self.q_norm is not None:
            tensors[f"{prefix}.q_norm.weight"] = self.q_norm.weight
            tensors[f"{prefix}.k_norm.weight"] = self.k_norm.weight
        return tensors


class MLP(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.ops = kernels.ops
        size, factory = config.intermediate_size, {"bias": False, "dtype": dtype, "device": device}
        self.gate_up_proj = Linear(config.hidden_size, [size, size], **factory)
        self.down_proj = Linear(size, [config.hidden_size], **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.ops.silu_mul(self.gate_up_proj(x)))

    def checkpoint_tensors(self, prefix: str) -> dict[str, Tensor]:
        merged = self.gate_up_proj.parts([f"{prefix}.gate_proj", f"{prefix}.up_proj"])
        return merged | self.down_proj.parts([f"{prefix}.down_proj"])


class DecoderLayer(nn.Module):
    def __init__(
        self,
        config: ModelConfig,
        kernels: Kernels,
        sliding_window: int | None,
        dtype: torch.dtype,
        device: torch.device,
    ):
        super().__init__()
        factory = {"dtype": dtype, "device": device}
        self.attention = Attention(config, kernels, sliding_window, **factory)
        self.mlp = MLP(config, kernels, **factory)
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels.ops, **factory)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels.ops, **factory)

    def forward(
        self,
        residual: Tensor,
        delta: Tensor | None,
        rotation: tuple[Tensor, Tensor],
        kv_cache: KVCache,
        metadata: AttentionMetadata,
    ) -> Tensor:
        """Adds to residual [T, hidden_size], in place, the last layer's `delta` (the first has none) and this
        layer's attention. Returns what its MLP adds, for the next norm to add: that is one pass less.
        """
        normed = self.attention_norm.add(residual, delta)
        normed = self.mlp_norm.add(residual, self.attention(normed, rotation, kv_cache, metadata))
        return self.mlp(normed)

    def checkpoint_tensors(self, prefix: str) -> dict[str, Tensor]:
        norms = {
            f"{prefix}.input_layernorm.weight": self.attention_norm.weight,
            f"{prefix}.post_attention_layernorm.weight": self.mlp_norm.weight,
        }
        attention = self.attention.checkpoint_tensors(f"{prefix}.self_attn")
        return norms | attention | self.mlp.checkpoint_tensors(f"{prefix}.mlp")


class Decoder(nn.Module):
    """A whole model, its weights not yet loaded: see `ingine.models.load_model`."""

    def __init__(self, config: ModelConfig, kernels: Kernels, *, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.config, self.kernels, self.dtype, self.device = config, kernels, dtype, device
        factory = {"dtype": dtype, "device": device}
        self.lm_head = Linear(config.hidden_size, [config.vocab_size], bias=False, **factory)
        self.embed_tokens = self.lm_head.weight
        if not config.tie_word_embeddings:
            self.embed_tokens = nn.Parameter(torch.empty_like(self.lm_head.weight), requires_grad=False)
        self.embedding: Embedding | None = None
        self.rotary = RotaryEmbedding(config.rope_inv_freq, config.rope_attention_scaling, **factory)
        self.layers = nn.ModuleList(
            DecoderLayer(config, kernels, sliding_window, dtype, device)
            for sliding_window in config.sliding_windows
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels.ops, **factory)

    def forward(
        self, input_ids: Tensor, positions: Tensor, kv_caches: list[KVCache], metadata: AttentionMetadata
    ) -> Tensor:
        """input_ids and positions [T] -> final hidden states [T, hidden_size]; writes the tokens' KV."""
        residual, delta = self.embedding(input_ids), None
        rotation = self.rotary(positions)
        for layer, kv_cache in zip(self.layers, kv_caches, strict=True):
            delta = layer(residual, delta, rotation, kv_cache, metadata)
        return self.norm.add(residual, delta)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """hidden [R, hidden_size] -> [R, vocab_size]. Costly: pass only the rows that are sampled."""
        return self.lm_head(hidden)

    def pack_weights(self) -> None:
        """Bring the loaded weights into the layout they are multiplied in. The model runs only after this."""
        weights = self.kernels.weights
        for layer in self.layers:
            for module in layer.modules():
                if isinstance(module, Linear):
                    module.pack(weights)
        if self.config.tie_word_embeddings:
            self.embedding, self.embed_tokens = self.lm_head.pack_tied(weights), None
        else:
            self.lm_head.pack(weights)
            self.embedding = embedding(self.embed_tokens)

    def allocate_kv_caches(self, num_blocks: int, block_size: int) -> list[KVCache]:
        """One cache a layer, `num_blocks` blocks of `block_size` tokens each."""
        config = self.config
        return [
            self.kernels.attention.allocate_kv_cache(
                num_blocks, block_size, config.num_kv_heads, config.head_dim, self.dtype, self.device
            )
            for _ in self.layers
        ]

    def bytes_per_block(self, block_size: int) -> int:
        """Bytes that one block takes in all layers together."""
        config = self.config
        per_layer = self.kernels.attention.bytes_per_block(
            block_size, config.num_kv_heads, config.head_dim, self.dtype
        )
        return per_layer * config.num_layers

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        """Every tensor a checkpoint must have, by its Hugging Face name: views into the merged parameters."""
        tensors = {"model.embed_tokens.weight": self.embed_tokens, "model.norm.weight": self.norm.weight}
        if not self.config.tie_word_embeddings:
            tensors |= self.lm_head.parts(["lm_head"])
        for index, layer in enumerate(self.layers):
            tensors |= layer.checkpoint_tensors(f"model.layers.{index}")
        return tensors
