"""Measures which columns of a layer's matrices are multiplied by the largest activations.

A few columns of a decoder's activations are far larger than the others, for any input. So random tokens show
them as well as text does (docs/log.md), and no data is needed.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from ingine.engine.kernels.attention import AttentionMetadata
from ingine.engine.kernels.layers.linear import Linear
from ingine.engine.kernels.layers.weights import Product, WeightFormat
from ingine.engine.models.decoder import Decoder, DecoderLayer

NUM_TOKENS = 512
"""Most tokens of the probe; a power of two, so that sums have one order."""

STRIDE = 7919
"""Difference between consecutive ids; a prime, so that they spread over any vocabulary."""

BLOCK_SIZE = 16


class Probe:
    """A sequence that runs through the layers one by one while they are loaded."""

    def __init__(self, model: Decoder, embed_tokens: Tensor, weights: WeightFormat):
        """embed_tokens: [vocab_size, hidden_size]. weights: the format to multiply with while measuring."""
        length = NUM_TOKENS
        while length > model.config.max_position_embeddings:
            length //= 2
        token_ids = torch.arange(length, device=model.device) * STRIDE % model.config.vocab_size
        self._residual, self._delta = embed_tokens[token_ids], None
        self._rotation = model.rotary(torch.arange(length, device=model.device))
        self._weights, self._model, self._metadata = weights, model, _metadata(length)

    def run(self, layer: DecoderLayer, linears: Iterable[Linear]) -> dict[Linear, Tensor]:
        """Run `layer`, of which `linears` are loaded and the others packed.

        Returns, for each of `linears`, the mean square [in_features] of the columns of its input.
        """
        found: dict[Linear, Tensor] = {}
        for linear in linears:
            linear.product = self._measured(linear, found)
        model, config = self._model, self._model.config
        kv_cache = model.kernels.attention.allocate_kv_cache(
            -(-len(self._residual) // BLOCK_SIZE),
            *(BLOCK_SIZE, config.num_kv_heads, config.head_dim, model.dtype, model.device),
        )
        self._delta = layer(self._residual, self._delta, self._rotation, kv_cache, self._metadata)
        return found

    def _measured(self, linear: Linear, found: dict[Linear, Tensor]) -> Product:
        product = self._weights.pack(linear.weight, linear.bias)

        def measured(x: Tensor) -> Tensor:
            squares = x.float().square()
            while len(squares) > 1:
                half = len(squares) // 2
                squares = squares[:half] + squares[half:]
            found[linear] = squares[0] / len(x)
            return product(x)

        return measured


def _metadata(length: int) -> AttentionMetadata:
    return AttentionMetadata(
        slot_mapping=torch.arange(length),
        block_tables=torch.arange(-(-length // BLOCK_SIZE), dtype=torch.int32)[None],
        seq_lens=torch.tensor([length], dtype=torch.int32),
        query_start_loc=torch.tensor([0, length], dtype=torch.int32),
        num_decodes=0,
        query_lens=[length],
        kv_lens=[length],
    )
