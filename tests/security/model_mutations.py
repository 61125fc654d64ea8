"""Damages a model's files: values, structure and bytes. A seed always gives the same damage.

Damage that is not specific to models is in `benchmarks/fuzz/mutations.py`.
"""

import json
import shutil
import struct
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.fuzz import mutations
from benchmarks.fuzz.mutations import INTEGERS, Values, changed, damaged, json_scalar
from tests.engine.foreign import CHECKPOINTS, quantize_model
from tests.security.gguf_bytes import ARRAY, FORMATS, STRING, Elements, GGUFBytes, Tensor, tiny_gguf
from tests.tiny_models import make_tiny_model

# fmt: off
MODEL_TEXTS = (
    "a", "</s>", "<|im_end|>", "<unk>", "▁", "../../etc/passwd", "/dev/zero", "%d" * 50, "x" * 5000,
    "BPE", "Unigram", "WordPiece", "WordLevel", "ByteLevel", "Sequence", "Split", "Replace", "Metaspace",
    "linear", "yarn", "llama3", "dynamic", "float16", "F32", "BF16", "I8", "llama", "mistral", "qwen2",
    "qwen3", "NFC", "LlamaTokenizer", "MistralForCausalLM", "(a+)+$", "[", "(?:a{1000}){1000}",
)
TEMPLATES = (
    "{{ messages[0].content }}", "{% for m in messages %}", "{% endfor %}", "{% if true %}", "{% endif %}",
    "{{ ", " }}", "{%", "%}", "{#", "#}", "'a' * 10", "|length", "|tojson", "|join(',')", "[::-1]", "f(1)",
    "{% set x = 1 %}", "{% macro f(x) %}", "{% endmacro %}", "namespace(a=1)", "{% generation %}", "range(9)",
    "strftime_now('%Y')", "raise_exception('x')", "messages.__class__", "|map('upper')|list", "1 / 0",
    "{% break %}", "{% raw %}", "{% endraw %}", "|sort", "|batch(3)", "|indent(4)", "bos_token", "-9999",
    "loop.index0",
)
"""Pieces of templates."""
# fmt: on

TEXTS = (*mutations.TEXTS, *MODEL_TEXTS)
NUMBERS = (3, 16, 2**62, 10**30, 1e38, 1e39)
"""Sizes, and floats near the largest 32-bit one, in addition to the generally unusual numbers."""

_PARTS_FILE = Path(__file__).with_name("tokenizer_parts.jsonl")
TOKENIZER_PARTS = [json.loads(line) for line in _PARTS_FILE.read_text(encoding="utf-8").splitlines()]
"""Parts of tokenizer.json that replace the tiny model's own."""


def _model_scalar(rng: Random) -> Any:
    match rng.randrange(4):
        case 0:
            return json_scalar(rng)
        case 1:
            return rng.choice((*NUMBERS, *INTEGERS))
        case 2:
            return rng.randrange(1000)
        case _:
            return rng.choice(TEXTS)


MODEL_VALUES = Values(_model_scalar, lambda rng: rng.choice(TEXTS))


class Mutator:
    """Writes damaged models of one kind into `folder`, which it owns."""

    def __init__(self, parser: str, folder: Path, seed: int):
        self._folder, self._dice = folder, Random(f"{parser} {seed}")
        self._damage = getattr(self, f"_{parser}")
        self._original = folder / "original"
        shutil.rmtree(folder, ignore_errors=True)
        make_tiny_model(self._original, num_layers=1)
        self.model = folder / "model"
        self._quantized_by: dict[str, Path] = {}

    def next(self) -> Path:
        """Write another damaged model, and return its folder."""
        shutil.rmtree(self.model, ignore_errors=True)
        shutil.copytree(self._original, self.model)
        self._damage()
        return self.model

    # ------------------------------------------------------------------------------------- GGUF

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
            new = self._gguf_array(value.kind, self._dice.randrange(3))
            values[place : place + self._dice.randrange(3)] = new
            value = replace(value, values=values)
        elif kind == ARRAY:
            value = replace(value, count=self._size())
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
            return self._dice.choice(TEXTS)
        return self._dice.randbytes(struct.calcsize(f"<{FORMATS[kind]}"))

    def _gguf_array(self, kind: int, count: int) -> list:
        return [self._gguf_value(kind) for _ in range(count)]

    def _tensor(self, file: GGUFBytes) -> GGUFBytes:
        dice, tensors = self._dice, list(file.tensors)
        place = dice.randrange(len(tensors))
        one = tensors[place]
        match dice.randrange(6):
            case 0:
                one = replace(one, kind=dice.randrange(42))
            case 1:
                one = replace(one, shape=tuple(dice.choice((size, self._size())) for size in one.shape))
            case 2:
                one = replace(one, offset=dice.choice((0, 32, one.offset ^ 32, one.offset + 4)))
            case 3:
                name = dice.choice(tensors).name
                names = (name, name.replace("0", "1"), "rope_freqs.weight", "x")
                one = replace(one, name=dice.choice(names))
            case 4:
                one = replace(one, content=dice.randbytes(len(one.content)))
            case 5:
                content = dice.randbytes(32)
                tensors.append(Tensor("rope_freqs.weight", (8,), one.offset + (1 << 16), content))
        tensors[place] = one
        return replace(file, tensors=tuple(tensors))

    def _header(self, file: GGUFBytes) -> GGUFBytes:
        name = self._dice.choice(("version", "num_tensors", "num_keys"))
        number = self._size() % (2**32 if name == "version" else 2**64)
        return replace(file, **{name: self._dice.choice((number, self._dice.randrange(30)))})

    # ----------------------------------------------------------------------- safetensors and JSON

    def _safetensors(self) -> None:
        file = self.model / "model.safetensors"
        raw = file.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header, content = raw[8 : 8 + length], raw[8 + length :]
        match self._dice.randrange(5):
            case 0:
                file.write_bytes(self._bytes(raw, header=8 + length))
            case 1:
                file.write_bytes(self._size().to_bytes(8, "little") + header + content)
            case 2:
                file.unlink()
                weight_map = dict.fromkeys(json.loads(header), "a.safetensors")
                (self.model / "a.safetensors").write_bytes(raw)
                index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
                self._write(self.model / "model.safetensors.index.json", index)
            case _:
                header = json.dumps(changed(self._dice, json.loads(header), MODEL_VALUES)).encode()
                file.write_bytes(len(header).to_bytes(8, "little") + header + content)

    def _quantized(self) -> None:
        name = self._dice.choice(list(CHECKPOINTS))
        if name not in self._quantized_by:
            path = self._quantized_by[name] = self._folder / f"quantized-{name}"
            shutil.copytree(self._original, path)
            quantize_model(path, name, self._folder / f"dense-{name}")
        shutil.copytree(self._quantized_by[name], self.model, dirs_exist_ok=True)
        match self._dice.randrange(4):
            case 0:
                self._tensors()
            case 1:
                self._safetensors()
            case _:
                config = json.loads((self.model / "config.json").read_text())
                said = config["quantization_config"]
                other = CHECKPOINTS[self._dice.choice(list(CHECKPOINTS))]
                said = other if self._dice.random() < 0.2 else changed(self._dice, said, MODEL_VALUES)
                (self.model / "config.json").write_text(json.dumps(config | {"quantization_config": said}))

    def _tensors(self) -> None:
        """Change numbers, types and shapes of a tensor, in a well-formed file."""
        tensors = load_file(self.model / "model.safetensors")
        name = self._dice.choice([name for name in tensors if "_proj" in name])
        one = tensors[name]
        match self._dice.randrange(4):
            case 0:
                content = self._dice.randbytes(one.nbytes)
                tensors[name] = torch.frombuffer(bytearray(content), dtype=one.dtype).view(one.shape)
            case 1:
                tensors[name] = one.to(
                    self._dice.choice((torch.int8, torch.int32, torch.int64, torch.float16))
                )
            case 2:
                tensors[name] = self._dice.choice((one.reshape(-1), one[:0], one[None], one.t().contiguous()))
            case 3:
                tensors[self._dice.choice((name + "_2", name.replace("_proj", "_proj.x")))] = tensors.pop(
                    name
                )
        save_file(tensors, self.model / "model.safetensors", metadata={"format": "pt"})

    def _config(self) -> None:
        file = self.model / "config.json"
        config = json.loads(file.read_text())
        if self._dice.random() < 0.5:
            config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 64}
        if self._dice.random() < 0.3:
            rope = {"factor": 2.0, "original_max_position_embeddings": 64}
            rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
            config["rope_parameters"] |= rope | {"rope_type": self._dice.choice(("linear", "yarn", "llama3"))}
        if self._dice.random() < 0.2:
            config.pop(self._dice.choice(list(config)))
        self._write(file, config)

    def _generation_config(self) -> None:
        given = {"temperature": 0.5, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.1}
        given |= {"max_new_tokens": 9, "eos_token_id": [1, 2]}
        self._write(self.model / "generation_config.json", given)

    def _tokenizer(self) -> None:
        if self._dice.random() < 0.1:
            (self.model / "chat_template.jinja").write_bytes(self._dice.randbytes(20))
        names = ("tokenizer.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
        file = self.model / self._dice.choice(names)
        content = json.loads(file.read_text()) if file.exists() else {"eos_token": "a"}
        if file.name == "tokenizer.json" and self._dice.random() < 0.5:
            content |= self._dice.choice(TOKENIZER_PARTS)
        self._write(file, content)

    def _template(self) -> None:
        parts = [self._dice.choice(TEMPLATES) for _ in range(self._dice.randrange(1, 9))]
        template = self._dice.choice(("", " ")).join(parts)
        if self._dice.random() < 0.3:
            template = "{{ " + template.replace("{", "").replace("}", "").replace("%", "") + " }}"
        raw = template.encode()
        damage = self._dice.random() < 0.2
        (self.model / "chat_template.jinja").write_bytes(self._bytes(raw) if damage else raw)

    def _write(self, file: Path, content: Any) -> None:
        """Write damaged JSON."""
        raw = json.dumps(changed(self._dice, content, MODEL_VALUES)).encode()
        file.write_bytes(self._bytes(raw) if self._dice.random() < 0.1 else raw)

    # ------------------------------------------------------------------------------ of all of them

    def _size(self) -> int:
        """Draw a 64-bit size."""
        numbers = (self._dice.choice(INTEGERS), self._dice.randrange(1000))
        return abs(self._dice.choice(numbers)) % 2**64

    def _bytes(self, raw: bytes, header: int | None = None) -> bytes:
        """`raw` damaged, most often within the first `header` bytes."""
        if header is None or self._dice.random() < 0.25:
            return damaged(self._dice, raw)
        return damaged(self._dice, raw[:header]) + raw[header:]
