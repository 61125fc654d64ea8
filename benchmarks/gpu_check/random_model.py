"""Decoders of a given shape with random weights, made on the device. Their output does not matter."""

from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.gpu_check.plan import Plan, Shape
from ingine.engine.kernels.layers.weights import PlainWeights
from ingine.engine.kernels.select import Kernels, select_kernels, triton_kernels
from ingine.engine.models.config import ModelConfig
from ingine.engine.models.decoder import Decoder
from ingine.engine.models.rope import rope_frequencies

MAX_POSITION_EMBEDDINGS = 32_768
DEVIATION = 0.02


def kernels_for(plan: Plan, *, block_size: int, kv_cache_dtype: str = "auto") -> Kernels:
    """The kernels that the engine would choose; but on a CPU, KV formats run in Triton's interpreter, which
    fp8 needs.

    Everything else would take far longer there without saying anything about speed. torch multiplies the
    weights, as on a GPU, so that its profiler sees the products.
    """
    if plan.device == "cpu" and kv_cache_dtype != "auto":
        return triton_kernels(kv_cache_dtype)
    kernels = select_kernels(
        torch.device(plan.device),
        getattr(torch, plan.dtype),
        head_dim=plan.shape.head_dim,
        kv_cache_dtype=kv_cache_dtype,
        block_size=block_size,
    )
    return replace(kernels, weights=PlainWeights())


def model_config(shape: Shape, dtype: torch.dtype) -> ModelConfig:
    rope = {"rope_type": "default", "rope_theta": shape.rope_theta}
    return ModelConfig(
        architecture="Qwen2ForCausalLM",
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        rms_norm_eps=1e-6,
        max_position_embeddings=MAX_POSITION_EMBEDDINGS,
        rope_inv_freq=tuple(rope_frequencies(rope, shape.head_dim).tolist()),
        rope_attention_scaling=1.0,
        sliding_windows=(None,) * shape.num_layers,
        tie_word_embeddings=True,
        qkv_bias=True,
        output_bias=False,
        qk_norm=False,
        eos_token_ids=(),
        dtype=dtype,
    )


def kv_bytes_per_token(plan: Plan) -> int:
    """Bytes of KV per token, in the model's dtype."""
    shape = plan.shape
    return 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * getattr(torch, plan.dtype).itemsize


def random_decoder(plan: Plan, kernels: Kernels) -> tuple[Decoder, int]:
    """Make the model. Returns it, and the bytes of weights that a step reads: all, since the embedding is
    also the output matrix."""
    device, dtype = torch.device(plan.device), getattr(torch, plan.dtype)
    decoder = Decoder(model_config(plan.shape, dtype), kernels, dtype=dtype, device=device).eval()
    decoder.allocate_weights()
    tensors = decoder.checkpoint_tensors()
    fill_randomly(tensors)
    decoder.pack_weights()
    return decoder, sum(tensor.nbytes for tensor in tensors.values())


@torch.no_grad()
def fill_randomly(tensors: dict[str, Tensor]) -> None:
    """Fill tensors, by Hugging Face name, so that equal names and shapes get equal numbers on one device."""
    for index, (name, tensor) in enumerate(sorted(tensors.items())):
        if "norm" in name:
            tensor.fill_(1)
        else:
            generator = torch.Generator(tensor.device).manual_seed(index)
            tensor.normal_(std=DEVIATION, generator=generator)
