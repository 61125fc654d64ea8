"""Damage to a model's files: to values, to structure and to bytes. One seed gives the same damage."""

import json
import random
import shutil
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.security.gguf_bytes import ARRAY, FORMATS, STRING, Elements, GGUFBytes, Tensor, tiny_gguf
from tests.tiny_models import make_tiny_model

NUMBERS = [
    *(
        0,
        1,
        -1,
        2,
        3,
        7,
        16,
        255,
        2**15,
        2**31 - 1,
        2**31,
        2**32,
        2**53,
        2**62,
        2**63 - 1,
        2**63,
        2**64,
        10**30,
    ),
    *(0.0, -0.0, 0.5, 1e-320, 1e38, 1e39, 1e308, float("nan"), float("inf"), float("-inf")),
]
TEXTS = [
    *("", "a", " ", "\0", "\ud800", "é", "</s>", "<|im_end|>", "<unk>", "▁", "../../etc/passwd", "/dev/zero"),
    *(
        "BPE",
        "Unigram",
        "WordPiece",
        "WordLevel",
        "ByteLevel",
        "Sequence",
        "Split",
        "Replace",
        "Metaspace",
        "NFC",
    ),
    *(
        "linear",
        "yarn",
        "llama3",
        "dynamic",
        "float16",
        "F32",
        "BF16",
        "I8",
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
    ),
    *("(a+)+$", "[", "(?:a{1000}){1000}", "%d" * 50, "x" * 5000, "LlamaTokenizer", "MistralForCausalLM"),
]
TEMPLATES = [
    *("{{ messages[0].content }}", "{% for m in messages %}", "{% endfor %}", "{% if true %}", "{% endif %}"),
    *(
        "{{ ",
        " }}",
        "{%",
        "%}",
        "{#",
        "#}",
        "'a' * 10",
        "|length",
        "|tojson",
        "|join(',')",
        "[::-1]",
        "range(9)",
    ),
    *("{% set x = 1 %}", "{% macro f(x) %}", "{% endmacro %}", "f(1)", "namespace(a=1)", "{% generation %}"),
    *(
        "strftime_now('%Y')",
        "raise_exception('x')",
        "messages.__class__",
        "|map('upper')|list",
        "1 / 0",
        "-9999",
    ),
    *(
        "{% break %}",
        "{% raw %}",
        "{% endraw %}",
        "|sort",
        "|batch(3)",
        "|indent(4)",
        "bos_token",
        "loop.index0",
    ),
]


class Mutator:
    """Writes damaged models of one kind into `folder`, which is its own."""

    def __init__(self, parser: str, folder: Path, seed: int):
        self._folder, self._dice = folder, random.Random(f"{parser} {seed}")
        self._damage = getattr(self, f"_{parser}")
        self._original = folder / "original"
        shutil.rmtree(folder, ignore_errors=True)
        make_tiny_model(self._original, num_layers=1)
        self.model = folder / "model"

    def next(self) -> Path:
        """The folder of another damaged model."""
        shutil.rmtree(self.model, ignore_errors=True)
        shutil.copytree(self._original, self.model)
        self._damage()
        return self.model

    def _gguf(self) -> None:
        file = tiny_gguf(sentencepiece=self._dice.random() < 0.15)
        for _ in range(self._dice.choice((0, 1, 1, 1, 2, 3))):
            file = self._dice.choice((self._metadata, self._metadata, self._tensor, self._header))(file)
        raw = file.encode()
        if self._dice.random() < 0.25:
            raw = self._bytes(raw, header=2500)
        (self.model / "model.gguf").write_bytes(raw)

    def _metadata(self, file: GGUFBytes) -> GGUFBytes:
        key, kind, value = self._dice.choice(file.metadata)
        if self._dice.random() < 0.5:
            kind = self._dice.choice([*FORMATS, STRING, ARRAY])
            value = self._gguf_value(kind)
        elif kind == ARRAY and self._dice.random() < 0.7:
            values = list(value.values)
            place = self._dice.randrange(len(values) + 1)
            values[place : place + self._dice.randrange(3)] = self._gguf_array(
                value.kind, self._dice.randrange(3)
            )
            value = replace(value, values=values)
        elif kind == ARRAY:
            value = replace(value, count=abs(int(self._number(whole=True))) % 2**64)
        else:
            value = self._gguf_value(kind)
        if self._dice.random() < 0.1:
            key = self._dice.choice(("llama.rope.scaling.type", "llama.attention.sliding_window", *TEXTS))
        return file.with_value(key, kind, value)

    def _gguf_value(self, kind: int) -> Any:
        if kind == ARRAY:
            of = self._dice.choice([*FORMATS, STRING])
            return Elements(of, self._gguf_array(of, self._dice.randrange(5)))
        if kind == STRING:
            return self._dice.choice(TEXTS).encode("utf-8", "replace").decode()
        return self._dice.randbytes(struct.calcsize(f"<{FORMATS[kind]}"))

    def _gguf_array(self, kind: int, count: int) -> list:
        return [self._gguf_value(kind) for _ in range(count)]

    def _tensor(self, file: GGUFBytes) -> GGUFBytes:
        tensors = list(file.tensors)
        place = self._dice.randrange(len(tensors))
        one = tensors[place]
        match self._dice.randrange(6):
            case 0:
                one = replace(one, kind=self._dice.randrange(42))
            case 1:
                shape = tuple(
                    self._dice.choice((size, abs(int(self._number(whole=True))) % 2**64))
                    for size in one.shape
                )
                one = replace(one, shape=shape)
            case 2:
                one = replace(one, offset=self._dice.choice((0, 32, one.offset ^ 32, one.offset + 4)))
            case 3:
                name = self._dice.choice(tensors).name
                one = replace(
                    one, name=self._dice.choice((name, name.replace("0", "1"), "rope_freqs.weight", "x"))
                )
            case 4:
                one = replace(one, content=self._dice.randbytes(len(one.content)))
            case 5:
                tensors.append(
                    Tensor("rope_freqs.weight", (8,), one.offset + (1 << 16), self._dice.randbytes(32))
                )
        tensors[place] = one
        return replace(file, tensors=tuple(tensors))

    def _header(self, file: GGUFBytes) -> GGUFBytes:
        name = self._dice.choice(("version", "num_tensors", "num_keys"))
        number = abs(int(self._number(whole=True))) % (2**32 if name == "version" else 2**64)
        return replace(file, **{name: self._dice.choice((number, self._dice.randrange(30)))})

    def _safetensors(self) -> None:
        file = self.model / "model.safetensors"
        raw = file.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header, content = raw[8 : 8 + length], raw[8 + length :]
        match self._dice.randrange(5):
            case 0:
                file.write_bytes(self._bytes(raw, header=8 + length))
            case 1:
                length = abs(int(self._number(whole=True))) % 2**64
                file.write_bytes(length.to_bytes(8, "little") + header + content)
            case 2:
                file.unlink()
                weight_map = dict.fromkeys(json.loads(header), "a.safetensors")
                (self.model / "a.safetensors").write_bytes(raw)
                index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
                self._write(self.model / "model.safetensors.index.json", index)
            case _:
                tree = json.loads(header)
                for _ in range(self._dice.randrange(1, 3)):
                    tree = self._tree(tree)
                header = _dumped(tree)
                file.write_bytes(len(header).to_bytes(8, "little") + header + content)

    def _config(self) -> None:
        file = self.model / "config.json"
        config = json.loads(file.read_text())
        if self._dice.random() < 0.5:
            config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 64}
        if self._dice.random() < 0.3:
            kind = self._dice.choice(("linear", "yarn", "llama3"))
            config["rope_parameters"] |= {
                "rope_type": kind,
                "factor": 2.0,
                "original_max_position_embeddings": 64,
            }
            config["rope_parameters"] |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
        if self._dice.random() < 0.2:
            config.pop(self._dice.choice(list(config)))
        self._write(file, config)

    def _generation_config(self) -> None:
        given = {"temperature": 0.5, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.1}
        self._write(
            self.model / "generation_config.json", given | {"max_new_tokens": 9, "eos_token_id": [1, 2]}
        )

    def _tokenizer(self) -> None:
        if self._dice.random() < 0.1:
            (self.model / "chat_template.jinja").write_bytes(self._dice.randbytes(20))
        name = self._dice.choice(
            ("tokenizer.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
        )
        content = (
            json.loads((self.model / name).read_text())
            if (self.model / name).exists()
            else {"eos_token": "a"}
        )
        if name == "tokenizer.json" and self._dice.random() < 0.5:
            content |= self._dice.choice(PARTS)
        self._write(self.model / name, content)

    def _template(self) -> None:
        parts = [self._dice.choice(TEMPLATES) for _ in range(self._dice.randrange(1, 9))]
        template = self._dice.choice(("", " ")).join(parts)
        if self._dice.random() < 0.3:
            template = "{{ " + template.replace("{", "").replace("}", "").replace("%", "") + " }}"
        raw = template.encode()
        (self.model / "chat_template.jinja").write_bytes(
            self._bytes(raw) if self._dice.random() < 0.2 else raw
        )

    def _write(self, file: Path, content: Any) -> None:
        """Damaged once or twice."""
        for _ in range(self._dice.choice((1, 1, 1, 2, 3))):
            content = self._tree(content)
        raw = _dumped(content)
        file.write_bytes(self._bytes(raw) if self._dice.random() < 0.1 else raw)

    def _tree(self, tree: Any) -> Any:
        """`tree` with another value at some place, or with one value less or more."""
        if not isinstance(tree, dict | list) or not tree or self._dice.random() < 0.02:
            return self._value(3)
        tree = dict(tree) if isinstance(tree, dict) else list(tree)
        place = self._dice.choice(list(tree) if isinstance(tree, dict) else range(len(tree)))
        if isinstance(tree[place], dict | list) and tree[place] and self._dice.random() < 0.8:
            tree[place] = self._tree(tree[place])
        elif self._dice.random() < 0.15:
            del tree[place]
        elif isinstance(tree, dict) and self._dice.random() < 0.1:
            tree[self._dice.choice(TEXTS)] = tree[place]
        else:
            tree[place] = self._value(3)
        return tree

    def _value(self, depth: int) -> Any:
        match self._dice.randrange(6 if depth else 4):
            case 0:
                return self._dice.choice((None, True, False, [], {}))
            case 1 | 2:
                return self._number()
            case 3:
                return self._dice.choice(TEXTS)
            case 4:
                return [self._value(depth - 1) for _ in range(self._dice.randrange(4))]
            case _:
                return {
                    self._dice.choice(TEXTS): self._value(depth - 1) for _ in range(self._dice.randrange(3))
                }

    def _number(self, *, whole: bool = False) -> int | float:
        numbers = [number for number in NUMBERS if isinstance(number, int)] if whole else NUMBERS
        return self._dice.choice((self._dice.choice(numbers), self._dice.randrange(1000)))

    def _bytes(self, raw: bytes, header: int | None = None) -> bytes:
        """Some bytes changed, taken away or put in, most of them within the first `header`."""
        damaged = bytearray(raw)
        for _ in range(self._dice.randrange(1, 4)):
            place = self._dice.randrange(min(len(damaged), header or len(damaged)) + 1)
            damaged[place : place + self._dice.randrange(4)] = self._dice.randbytes(self._dice.randrange(4))
        return bytes(
            damaged[: self._dice.choice((len(damaged), len(damaged), self._dice.randrange(len(damaged) + 1)))]
        )


def _dumped(tree: Any) -> bytes:
    return json.dumps(tree).encode()


_VOCAB = {"<unk>": 0, "a": 1, "b": 2, "ab": 3, "▁": 4}
_SPLIT = {"type": "Split", "pattern": {"Regex": "a+"}, "behavior": "Isolated", "invert": False}
PARTS: list[dict[str, Any]] = [
    {
        "model": {
            "type": "Unigram",
            "unk_id": 0,
            "vocab": [[token, -1.0] for token in _VOCAB],
            "byte_fallback": True,
        }
    },
    {"model": {"type": "WordLevel", "vocab": _VOCAB, "unk_token": "<unk>"}},
    {
        "model": {
            "type": "WordPiece",
            "unk_token": "<unk>",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": _VOCAB,
        }
    },
    {
        "model": {
            "type": "BPE",
            "vocab": _VOCAB,
            "merges": [["a", "b"]],
            "byte_fallback": True,
            "unk_token": "<unk>",
        }
    },
    {
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [_SPLIT, {"type": "Digits", "individual_digits": True}],
        }
    },
    {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False}},
    {"normalizer": {"type": "Replace", "pattern": {"Regex": "a"}, "content": "b"}},
    {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "Prepend", "prepend": "▁"}, {"type": "NFKC"}],
        }
    },
    {
        "normalizer": {
            "type": "Precompiled",
            "precompiled_charsmap": "ALQCAACEAAAAAACAAQAAgMz8AgC4BQAAhyIAgMzkAgC4PQAA",
        }
    },
    {"decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]}},
    {"decoder": {"type": "Strip", "content": " ", "start": 1, "stop": 0}},
    {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<s>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        }
    },
    {"truncation": {"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}},
    {
        "padding": {
            "strategy": {"Fixed": 10},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "a",
        }
    },
]
"""Parts of tokenizer.json in place of the tiny model's own."""
