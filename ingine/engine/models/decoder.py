"""The decoder: Llama, SmolLM, Mistral, Qwen2 and Qwen3 are one model with a few switches.

The tokens of all sequences of a step are packed along one dimension, T. The step's `AttentionMetadata`, which
attention and the linear layers of a `DecoderLayer` receive, says where each sequence ends. Run the decoder
under `torch.inference_mode()`.

With tensor parallelism a rank has a part of the heads, of the MLP's columns and of the vocabulary, and
computes its part of sums over all ranks.
"""

from math import gcd

import torch
from torch import Tensor, nn

from ingine.engine.communication.parallel import SINGLE, TensorParallel, shard
from ingine.engine.kernels.attention import AttentionMetadata, KVCache
from ingine.engine.kernels.layers.linear import Linear, empty_parameter
from ingine.engine.kernels.layers.norm import RMSNorm
from ingine.engine.kernels.layers.rotary import RotaryEmbedding
from ingine.engine.kernels.layers.stored import StoredMatrix
from ingine.engine.kernels.layers.weights import Embedding, embedding
from ingine.engine.kernels.select import Kernels
from ingine.engine.models.config import ModelConfig
from ingine.errors import ConfigError

Linears = dict[Linear, list[str]]
"""Linear layers, each with the names of the checkpoint's modules that it merges."""


class Attention(nn.Module):
    def __init__(
        self,
        config: ModelConfig,
        kernels: Kernels,
        sliding_window: int | None,
        parallel: TensorParallel,
        dtype: torch.dtype,
        device: torch.device,
    ):
        super().__init__()
        self.backend, self.parallel = kernels.attention, parallel
        self.sliding_window = sliding_window
        self.num_heads = config.num_heads // parallel.size
        self.num_kv_heads = config.num_kv_heads // parallel.size
        self.head_dim = config.head_dim
        self.scale = config.head_dim**-0.5
        q_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        factory = {"dtype": dtype, "device": device}
        # Values are the most sensitive to rounding, and are few (docs/log.md).
        self.qkv_proj = Linear(
            config.hidden_size,
            [q_size, kv_size, kv_size],
            bias=config.qkv_bias,
            num_delicate=kv_size,
            **factory,
        )
        self.o_proj = Linear(q_size, [config.hidden_size], bias=config.output_bias, **factory)
        self.q_norm = self.k_norm = None
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps, kernels.ops, **factory)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps, kernels.ops, **factory)

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], kv_cache: KVCache, metadata: AttentionMetadata
    ) -> Tensor:
        heads = self.qkv_proj(x, metadata).view(len(x), -1, self.head_dim)
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
        return self.parallel.all_reduce(self.o_proj(attended.flatten(1), metadata))

    def linears(self, prefix: str) -> Linears:
        return {
            self.qkv_proj: [f"{prefix}.{name}_proj" for name in "qkv"],
            self.o_proj: [f"{prefix}.o_proj"],
        }

    def norms(self, prefix: str) -> dict[str, Tensor]:
        if self.q_norm is None:
            return {}
        return {f"{prefix}.q_norm.weight": self.q_norm.weight, f"{prefix}.k_norm.weight": self.k_norm.weight}


class MLP(nn.Module):
    def __init__(
        self,
        config: ModelConfig,
        kernels: Kernels,
        parallel: TensorParallel,
        dtype: torch.dtype,
        device: torch.device,
    ):
        super().__init__()
        self.ops, self.parallel = kernels.ops, parallel
        size = config.intermediate_size // parallel.size
        factory = {"bias": False, "dtype": dtype, "device": device}
        self.gate_up_proj = Linear(config.hidden_size, [size, size], **factory)
        self.down_proj = Linear(size, [config.hidden_size], **factory)

    def forward(self, x: Tensor, metadata: AttentionMetadata) -> Tensor:
        hidden = self.ops.silu_mul(self.gate_up_proj(x, metadata))
        return self.parallel.all_reduce(self.down_proj(hidden, metadata))

    def linears(self, prefix: str) -> Linears:
        return {
            self.gate_up_proj: [f"{prefix}.gate_proj", f"{prefix}.up_proj"],
            self.down_proj: [f"{prefix}.down_proj"],
        }


class DecoderLayer(nn.Module):
    def __init__(
        self,
        config: ModelConfig,
        kernels: Kernels,
        sliding_window: int | None,
        parallel: TensorParallel,
        dtype: torch.dtype,
        device: torch.device,
    ):
        super().__init__()
        factory = {"dtype": dtype, "device": device}
        self.attention = Attention(config, kernels, sliding_window, parallel, **factory)
        self.mlp = MLP(config, kernels, parallel, **factory)
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
        """Add to residual [T, hidden_size], in place, the `delta` of the layer before (None for the first
        layer) and this layer's attention. Returns the output of the MLP, which the next norm adds: this saves
        one pass over memory.
        """
        normed = self.attention_norm.add(residual, delta)
        normed = self.mlp_norm.add(residual, self.attention(normed, rotation, kv_cache, metadata))
        return self.mlp(normed, metadata)

    def linears(self, prefix: str) -> Linears:
        return self.attention.linears(f"{prefix}.self_attn") | self.mlp.linears(f"{prefix}.mlp")

    def norms(self, prefix: str) -> dict[str, Tensor]:
        return {
            f"{prefix}.input_layernorm.weight": self.attention_norm.weight,
            f"{prefix}.post_attention_layernorm.weight": self.mlp_norm.weight,
        } | self.attention.norms(f"{prefix}.self_attn")


class Decoder(nn.Module):
    """A model, or this rank's part of it, its weights not yet loaded: see `ingine.engine.models.loader`."""

    def __init__(
        self,
        config: ModelConfig,
        kernels: Kernels,
        *,
        dtype: torch.dtype,
        device: torch.device,
        parallel: TensorParallel = SINGLE,
    ):
        """Raises ConfigError for a model that cannot be split evenly over the ranks of `parallel`."""
        super().__init__()
        _check_split(config, parallel.size)
        self.config, self.kernels, self.dtype, self.device = config, kernels, dtype, device
        self.parallel = parallel
        self.mapped_bytes = 0
        """Bytes of weights in mapped files; the loader sets it."""
        factory = {"dtype": dtype, "device": device}
        # All ranks have the same number of rows, so that logits can be gathered. If the size of the
        # vocabulary is no multiple, the last rank has padding rows.
        num_rows = -(-config.vocab_size // parallel.size)
        self.lm_head = Linear(config.hidden_size, [num_rows], bias=False, num_delicate=num_rows, **factory)
        self.embed_tokens: nn.Parameter | None = self.lm_head.weight
        if not config.tie_word_embeddings:
            self.embed_tokens = empty_parameter(self.lm_head.weight.shape, dtype, torch.device("meta"))
        self.embedding: Embedding | None = None
        self.rotary = RotaryEmbedding(config.rope_inv_freq, config.rope_attention_scaling, **factory)
        self.layers = nn.ModuleList(
            DecoderLayer(config, kernels, sliding_window, parallel, dtype, device)
            for sliding_window in config.sliding_windows
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels.ops, **factory)

    def forward(
        self, input_ids: Tensor, positions: Tensor, kv_caches: list[KVCache], metadata: AttentionMetadata
    ) -> Tensor:
        """Compute final hidden states [T, hidden_size] of tokens [T] at positions [T], and write their KV."""
        residual, delta = self.embed(input_ids), None
        rotation = self.rotary(positions)
        for layer, kv_cache in zip(self.layers, kv_caches, strict=True):
            delta = layer(residual, delta, rotation, kv_cache, metadata)
        return self.norm.add(residual, delta)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Embed input_ids [T] to [T, hidden_size]. Ranks look up their own tokens and sum the results."""
        if self.parallel.size == 1:
            return self.embedding(input_ids)
        own = shard(self.config.vocab_size, self.parallel.rank, self.parallel.size)
        is_foreign = (input_ids < own.start) | (input_ids >= own.stop)
        rows = self.embedding((input_ids - own.start).masked_fill_(is_foreign, 0))
        return self.parallel.all_reduce(rows.masked_fill_(is_foreign[:, None], 0))

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Compute contiguous logits [R, vocab_size] from hidden [R, hidden_size]. This is costly: pass only
        rows that are sampled.
        """
        # All ranks gather, though only rank 0 samples: this takes rank 0 no longer. NCCL's gather consists of
        # sends and receives, which have not been tested in a graph.
        return self.parallel.all_gather(self.lm_head(hidden), self.config.vocab_size)

    def allocate_weights(self) -> None:
        """Allocate all weights at once, uninitialised, so that `checkpoint_tensors` can be filled."""
        for linear in self.linears():
            linear.allocate()
        self.allocate_embedding()

    def allocate_embedding(self) -> None:
        if self.config.tie_word_embeddings:
            self.lm_head.allocate()
            self.embed_tokens = self.lm_head.weight
        else:
            self.embed_tokens = empty_parameter(self.embed_tokens.shape, self.dtype, self.device)

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        """Return every tensor that a checkpoint must have, by its Hugging Face name: views into this rank's
        merged parameters. Tensors of matrices that are not allocated have only a shape.
        """
        tensors = {"model.embed_tokens.weight": self.embed_tokens} | self.norms()
        for linear, names in self.linears().items():
            tensors |= linear.parts(names)
        return tensors

    def pack_weights(self) -> None:
        """Convert the loaded weights to the layout of the products. The model can run only after this."""
        for linear in self.linears():
            linear.pack(self.kernels.weights)
        self.pack_embedding()

    def pack_embedding(self) -> None:
        if self.config.tie_word_embeddings:
            self.embedding, self.embed_tokens = self.lm_head.pack_tied(self.kernels.weights), None
        else:
            self.embedding = embedding(self.embed_tokens)

    def pack_stored_embedding(self, matrix: StoredMatrix) -> None:
        """Pack an embedding that a checkpoint holds quantised, as `pack_embedding` does."""
        weights, self.embed_tokens = self.kernels.weights, None
        if self.config.tie_word_embeddings:
            self.embedding = self.lm_head.pack_tied_stored(weights, matrix)
        else:
            self.embedding = weights.embed_stored(matrix, self.dtype)

    def linears(self) -> Linears:
        """Return all linear layers, except for an output matrix that is also the embedding."""
        found: Linears = {}
        for index, layer in enumerate(self.layers):
            found |= layer.linears(f"model.layers.{index}")
        if not self.config.tie_word_embeddings:
            found[self.lm_head] = ["lm_head"]
        return found

    def numerics(self) -> list[str]:
        """Return how loading has changed the weights, as far as it affects tokens: for `config.numerics`.

        The result depends on the machine's kernels and the ranks, beside the checkpoint and settings.
        """
        linears = [module for module in self.modules() if isinstance(module, Linear)]
        num_rounding = sum(linear.num_rounding for linear in linears)
        by_importance = any(linear.by_importance for linear in linears)
        return [
            *(["by-importance"] if by_importance else []),
            *([f"as-stored-{num_rounding}"] if num_rounding else []),
        ]

    def norms(self) -> dict[str, Tensor]:
        """Return the weights of all norms by their Hugging Face names."""
        tensors = {"model.norm.weight": self.norm.weight}
        for index, layer in enumerate(self.layers):
            tensors |= layer.norms(f"model.layers.{index}")
        return tensors

    def allocate_kv_caches(self, num_blocks: int, block_size: int) -> list[KVCache]:
        """Allocate one cache for each layer, of `num_blocks` blocks of `block_size` tokens."""
        config, num_kv_heads = self.config, self.config.num_kv_heads // self.parallel.size
        return [
            self.kernels.attention.allocate_kv_cache(
                num_blocks, block_size, num_kv_heads, config.head_dim, self.dtype, self.device
            )
            for _ in self.layers
        ]

    def bytes_per_block(self, block_size: int) -> int:
        """Return the bytes of one block in all layers of this rank."""
        config = self.config
        per_layer = self.kernels.attention.bytes_per_block(
            block_size, config.num_kv_heads // self.parallel.size, config.head_dim, self.dtype
        )
        return per_layer * config.num_layers


def _check_split(config: ModelConfig, size: int) -> None:
    numbers = {
        "attention heads": config.num_heads,
        "key/value heads": config.num_kv_heads,
        "columns of the MLP (intermediate_size)": config.intermediate_size,
    }
    largest = gcd(*numbers.values())
    for name, number in numbers.items():
        if number % size:
            possible = ", ".join(str(n) for n in range(1, largest + 1) if largest % n == 0)
            raise ConfigError(
                f"tensor_parallel_size {size}: {number} {name} cannot be split evenly. "
                f"Possible with this model: {possible}"
            )
