"""Builds GGUF files as bytes from parts, so that each part may be wrong."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
UINT8, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64, FLOAT64 = 0, 4, 5, 6, 7, 8, 9, 10, 12
F32 = 0
ALIGNMENT = 32


@dataclass(frozen=True)
class Elements:
    kind: int
    values: Sequence[Any]
    count: int | None = None
    """The count that the file claims; None: the true one."""


@dataclass(frozen=True)
class Tensor:
    name: str
    shape: tuple[int, ...]
    offset: int
    content: bytes = b""
    kind: int = F32
    num_dimensions: int | None = None


@dataclass(frozen=True)
class GGUFBytes:
    metadata: tuple[tuple[str, int, Any], ...] = ()
    """(key, type, value)"""
    tensors: tuple[Tensor, ...] = ()
    version: int = 3
    num_tensors: int | None = None
    num_keys: int | None = None
    magic: bytes = b"GGUF"
    tail: bytes = field(default=b"")

    def encode(self) -> bytes:
        counts = (
            len(self.tensors) if self.num_tensors is None else self.num_tensors,
            len(self.metadata) if self.num_keys is None else self.num_keys,
        )
        parts = [self.magic, struct.pack("<IQQ", self.version, *counts)]
        for key, kind, value in self.metadata:
            parts += [string(key), struct.pack("<I", kind), encoded(kind, value)]
        for each in self.tensors:
            claimed = len(each.shape) if each.num_dimensions is None else each.num_dimensions
            parts += [
                string(each.name),
                struct.pack("<I", claimed),
                struct.pack(f"<{len(each.shape)}Q", *each.shape),
            ]
            parts.append(struct.pack("<IQ", each.kind, each.offset))
        header = b"".join(parts)
        start = -(-len(header) // ALIGNMENT) * ALIGNMENT
        end = max((each.offset + len(each.content) for each in self.tensors if each.content), default=0)
        content = bytearray(start + end)
        content[: len(header)] = header
        for each in self.tensors:
            if each.content:
                content[start + each.offset : start + each.offset + len(each.content)] = each.content
        return bytes(content) + self.tail

    def with_value(self, key: str, kind: int, value: Any) -> "GGUFBytes":
        """Replace the value of `key`, or add it."""
        others = tuple(entry for entry in self.metadata if entry[0] != key)
        return replace(self, metadata=(*others, (key, kind, value)))


def string(text: str | bytes) -> bytes:
    raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def encoded(kind: int, value: Any) -> bytes:
    """Encode a value. Bytes are used as they are."""
    if isinstance(value, bytes):
        return value
    if kind == STRING:
        return string(value)
    if kind == ARRAY:
        count = len(value.values) if value.count is None else value.count
        items = b"".join(encoded(value.kind, each) for each in value.values)
        return struct.pack("<IQ", value.kind, count) + items
    return struct.pack(f"<{FORMATS[kind]}", value)


def tiny_gguf(*, sentencepiece: bool = False) -> GGUFBytes:
    """A Llama model with one layer, and a tokenizer of either kind."""
    hidden, heads, head_dim, inner = 32, 2, 16, 32
    tokens = _sentencepiece_tokens() if sentencepiece else _byte_tokens()
    shapes = {
        "token_embd.weight": (hidden, len(tokens)),
        "output_norm.weight": (hidden,),
        "blk.0.attn_norm.weight": (hidden,),
        "blk.0.ffn_norm.weight": (hidden,),
        **{f"blk.0.attn_{name}.weight": (hidden, hidden) for name in ("q", "k", "v", "output")},
        "blk.0.ffn_gate.weight": (hidden, inner),
        "blk.0.ffn_up.weight": (hidden, inner),
        "blk.0.ffn_down.weight": (inner, hidden),
    }
    tensors, offset = [], 0
    for number, (name, shape) in enumerate(shapes.items()):
        count = shape[0] * (shape[1] if len(shape) > 1 else 1)
        content = struct.pack(f"<{count}f", *(((i * 7 + number) % 13 - 6) / 16 for i in range(count)))
        tensors.append(Tensor(name, shape, offset, content))
        offset += -(-len(content) // ALIGNMENT) * ALIGNMENT
    metadata = [
        ("general.architecture", STRING, "llama"),
        ("general.alignment", UINT32, ALIGNMENT),
        ("llama.embedding_length", UINT32, hidden),
        ("llama.block_count", UINT32, 1),
        ("llama.feed_forward_length", UINT32, inner),
        ("llama.context_length", UINT32, 128),
        ("llama.attention.head_count", UINT32, heads),
        ("llama.attention.head_count_kv", UINT32, heads),
        ("llama.attention.key_length", UINT32, head_dim),
        ("llama.attention.value_length", UINT32, head_dim),
        ("llama.rope.dimension_count", UINT32, head_dim),
        ("llama.attention.layer_norm_rms_epsilon", FLOAT32, 1e-5),
        ("llama.rope.freq_base", FLOAT32, 10_000.0),
        ("general.sampling.temp", FLOAT32, 0.5),
        ("tokenizer.ggml.model", STRING, "llama" if sentencepiece else "gpt2"),
        ("tokenizer.ggml.tokens", ARRAY, Elements(STRING, tokens)),
        ("tokenizer.ggml.token_type", ARRAY, Elements(INT32, _types(tokens))),
        ("tokenizer.ggml.bos_token_id", UINT32, 1),
        ("tokenizer.ggml.eos_token_id", UINT32, 2),
        ("tokenizer.chat_template", STRING, "{{ messages[0].content }}"),
    ]
    if sentencepiece:
        scores = [-float(number) for number in range(len(tokens))]
        metadata.append(("tokenizer.ggml.scores", ARRAY, Elements(FLOAT32, scores)))
    else:
        metadata += [
            ("tokenizer.ggml.pre", STRING, "smollm"),
            ("tokenizer.ggml.merges", ARRAY, Elements(STRING, ["a b", "ab c"])),
        ]
    return GGUFBytes(tuple(metadata), tuple(tensors))


def _byte_tokens() -> list[str]:
    return ["<unk>", "<s>", "</s>", *map(chr, range(ord("!"), ord("~") + 1)), "ab", "abc"]


def _sentencepiece_tokens() -> list[str]:
    return ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "ab"]


def _types(tokens: Sequence[str]) -> list[int]:
    named = {"<unk>": 2, "<s>": 3, "</s>": 3}
    return [named.get(token, 6 if token.startswith("<0x") else 1) for token in tokens]
