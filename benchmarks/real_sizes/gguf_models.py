"""Writes GGUF files with random weights, block by block: no weight is ever held in more bits than it has."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, LlamaFileType, TokenType

from benchmarks.real_sizes.shapes import Shape, TensorSpec, tensors

Kind = GGMLQuantizationType
Blocks = np.ndarray
"""uint8 [number of blocks, bytes per block]."""

FLOAT16_FIELDS: dict[Kind, Callable[[float], dict[int, float]]] = {
    Kind.Q4_0: lambda deviation: {0: deviation / 4.6},
    Kind.Q4_1: lambda deviation: {0: deviation / 4.6, 2: -7.5 * deviation / 4.6},
    Kind.Q8_0: lambda deviation: {0: deviation / 74},
    Kind.Q4_K: lambda deviation: {0: deviation / 227, 2: 7.5 * deviation / 227},
    Kind.Q6_K: lambda deviation: {208: deviation / 1370},
}
"""Byte offset -> value of the float16 fields of a block, chosen for weights with about the given standard
deviation and a mean near 0. All other bytes are random: codes, and the small scales of a K block."""

MIXES = ("Q4_0", "Q4_1", "Q8_0", "Q4_K_M")
FILE_TYPES = {
    "Q4_0": LlamaFileType.MOSTLY_Q4_0,
    "Q4_1": LlamaFileType.MOSTLY_Q4_1,
    "Q8_0": LlamaFileType.MOSTLY_Q8_0,
    "Q4_K_M": LlamaFileType.MOSTLY_Q4_K_M,
}


def kind_of(spec: TensorSpec, mix: str, shape: Shape) -> Kind:
    """The kind that llama.cpp's quantiser would choose in a file of type `mix`."""
    if len(spec.shape) == 1:
        return Kind.F32
    if mix == "Q8_0":
        return Kind.Q8_0
    output = "token_embd.weight" if shape.tied else "output.weight"
    if spec.gguf_name == output:
        return Kind.Q6_K
    if mix != "Q4_K_M":
        return Kind[mix]
    more_bits = spec.layer is not None and _has_more_bits(spec.layer, shape.num_layers)
    finer = more_bits and spec.gguf_name.endswith(("attn_v.weight", "ffn_down.weight"))
    return Kind.Q6_K if finer else Kind.Q4_K


def _has_more_bits(layer: int, num_layers: int) -> bool:
    eighth = num_layers // 8
    return layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2


def write_gguf(path: Path, shape: Shape, mix: str, *, tokenizer: Path, seed: int = 0) -> None:
    """Write the file `path`, atomically. tokenizer: a tokenizer.json of byte-level BPE."""
    unfinished = path.with_suffix(".unfinished")
    writer = GGUFWriter(unfinished, "qwen2")
    _add_metadata(writer, shape, mix)
    _add_tokenizer(writer, tokenizer, shape.vocab_size)
    specs = [(spec, kind_of(spec, mix, shape)) for spec in tensors(shape)]
    for spec, kind in specs:
        elements, size = GGML_QUANT_SIZES[kind]
        writer.add_tensor_info(
            spec.gguf_name,
            spec.shape,
            np.dtype(np.float32),  # where `raw_dtype` is not given
            math.prod(spec.shape) // elements * size,
            raw_dtype=kind,
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    draw = np.random.default_rng(seed)
    for spec, kind in specs:
        writer.write_tensor_data(random_tensor(draw, spec, kind))
    writer.close()
    unfinished.rename(path)


def random_tensor(draw: np.random.Generator, spec: TensorSpec, kind: Kind) -> np.ndarray:
    """Draw a norm of about 1, a bias of about 0, or the blocks of a matrix that preserves its input's
    magnitude."""
    if kind is Kind.F32:
        values = draw.normal(0, 0.1, spec.shape).astype(np.float32)
        return values + 1 if spec.gguf_name.endswith("norm.weight") else values
    elements, _ = GGML_QUANT_SIZES[kind]
    return random_blocks(draw, kind, math.prod(spec.shape) // elements, 1 / math.sqrt(spec.shape[-1]))


def random_blocks(draw: np.random.Generator, kind: Kind, num_blocks: int, deviation: float) -> Blocks:
    _, size = GGML_QUANT_SIZES[kind]
    blocks = np.frombuffer(bytearray(draw.bytes(num_blocks * size)), np.uint8).reshape(num_blocks, size)
    for place, value in FLOAT16_FIELDS[kind](deviation).items():
        blocks[:, place : place + 2] = np.frombuffer(np.float16(value).tobytes(), np.uint8)
    return blocks


def _add_metadata(writer: GGUFWriter, shape: Shape, mix: str) -> None:
    writer.add_name(f"{shape.name}, random")
    writer.add_file_type(FILE_TYPES[mix])
    writer.add_quantization_version(2)
    writer.add_block_count(shape.num_layers)
    writer.add_context_length(shape.max_position_embeddings)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_heads)
    writer.add_head_count_kv(shape.num_kv_heads)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_layer_norm_rms_eps(shape.rms_norm_eps)


def _add_tokenizer(writer: GGUFWriter, tokenizer: Path, vocab_size: int) -> None:
    """Add the tokenizer's tokens, then unused ones up to the rows of the embedding, as llama.cpp requires."""
    description = json.loads(tokenizer.read_text())
    model = description["model"]
    by_id = {token_id: token for token, token_id in model["vocab"].items()}
    special = {token["id"]: token["content"] for token in description["added_tokens"]}
    by_id |= special
    tokens = [by_id.get(token_id, f"<|unused_{token_id}|>") for token_id in range(vocab_size)]
    types = [TokenType.NORMAL if token_id in by_id else TokenType.UNUSED for token_id in range(vocab_size)]
    for token_id in special:
        types[token_id] = TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    writer.add_eos_token_id(min(special))
    writer.add_bos_token_id(min(special))
    writer.add_add_bos_token(False)
