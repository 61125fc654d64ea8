"""GGUF files, written here as llama.cpp writes them, and what our conversion makes of them."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama import LlamaConfig

from ingine.engine.kernels.select import REFERENCE
from ingine.engine.models import gguf as conversion
from ingine.engine.models.gguf import convert_gguf
from ingine.engine.models.loader import load_weights
from ingine.errors import ConfigError, UnsupportedModel
from tests.tiny_models import CHAT_TEMPLATE, SPECIAL_TOKENS, make_tiny_model, make_tokenizer

F32 = gguf.GGMLQuantizationType.F32
BYTES = [token for token, _ in sorted(make_tokenizer().get_vocab().items(), key=lambda item: item[1])][:256]
TOKENS = [*BYTES, "ab", "Ġab", *SPECIAL_TOKENS]
MERGES = ["a b", "Ġ ab"]
TYPES = [1] * 258 + [3] * 3
"""257 and 258 ordinary tokens, then control tokens."""


def write_gguf(
    path: Path,
    model: Path,
    arch: str,
    *,
    quantization: gguf.GGMLQuantizationType = F32,
    metadata: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray | None] | None = None,
) -> Path:
    """The tiny model in the folder `model` as a GGUF file; `metadata` and `tensors` override, None leaves one
    out.
    """
    config = json.loads((model / "config.json").read_text())
    fields = {
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "context_length": config["max_position_embeddings"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["head_dim"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": config["rope_parameters"]["rope_theta"],
    }
    fields = {f"{arch}.{name}": value for name, value in fields.items()}
    fields |= {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.token_type": TYPES,
        "tokenizer.ggml.eos_token_id": len(TOKENS) - 1,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    } | (metadata or {})
    writer = gguf.GGUFWriter(path, arch)
    for name, value in fields.items():
        add_metadata(writer, name, value)
    for name, weight in (gguf_tensors(model, config, arch) | (tensors or {})).items():
        if weight is not None:
            packed = weight if weight.ndim == 1 else gguf.quantize(weight, quantization)
            writer.add_tensor(name, packed, raw_dtype=F32 if weight.ndim == 1 else quantization)
    return written(writer, path)


def add_metadata(writer: gguf.GGUFWriter, name: str, value: Any) -> None:
    add = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    if value is not None:
        add[type(value)](name, value)


def written(writer: gguf.GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_tensors(model: Path, config: dict, arch: str) -> dict[str, np.ndarray]:
    """Names by the gguf package's own table, rows of queries and keys in llama.cpp's order."""
    table = gguf.MODEL_ARCH["LLAMA" if arch == "mistral" else arch.upper()]
    names = gguf.get_tensor_name_map(table, config["num_hidden_layers"])
    tensors = {}
    for name, tensor in load_file(model / "model.safetensors").items():
        weight = tensor.float().numpy()
        for projection, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            if projection in name and arch in ("llama", "mistral"):
                halves = weight.reshape(config[heads], 2, -1, *weight.shape[1:])
                weight = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))
        tensors[names.get_name(name, try_suffixes=(".weight", ".bias"))] = weight
    return tensors


def tiny(tmp_path: Path, arch: str = "llama", **kwargs) -> Path:
    return make_tiny_model(tmp_path / "model", arch, vocab_size=len(TOKENS), **kwargs)


def loaded(path: Path) -> dict[str, torch.Tensor]:
    device = torch.device("cpu")
    return load_weights(path, dtype=torch.float32, device=device, kernels=REFERENCE).checkpoint_tensors()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("arch", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_round_trip_changes_nothing(arch, tied, tmp_path):
    model = tiny(tmp_path, arch, tie_word_embeddings=tied)
    convert_gguf(write_gguf(tmp_path / "m.gguf", model, arch), tmp_path / "out")
    before, after = loaded(model), loaded(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)

    prompt = torch.tensor([[1, 2, 3, 200, 100]])
    with torch.inference_mode():
        expected = AutoModelForCausalLM.from_pretrained(model)(prompt).logits
        logits = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(prompt).logits
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_1"])
def test_no_weight_is_rounded_on_the_way(kind, tmp_path):
    """A model in float32 computes with the very numbers that are in the file."""
    quantization = gguf.GGMLQuantizationType[kind]
    model = tiny(tmp_path)
    file = write_gguf(tmp_path / "m.gguf", model, "llama", quantization=quantization)
    convert_gguf(file, tmp_path / "out")
    original, after = load_file(model / "model.safetensors"), loaded(tmp_path / "out")
    assert original.keys() == after.keys()
    for name, weight in original.items():
        expected = weight.numpy()
        if weight.ndim > 1:
            expected = gguf.dequantize(gguf.quantize(expected, quantization), quantization)
        assert torch.equal(after[name], torch.tensor(expected)), name
    torch.testing.assert_close(after["lm_head.weight"], original["lm_head.weight"], atol=0.05, rtol=0.05)


@pytest.mark.parametrize(("kind", "dtype"), [("F32", "float32"), ("F16", "float16"), ("BF16", "bfloat16")])
def test_weights_take_no_more_room_than_they_need(kind, dtype, tmp_path):
    quantization = gguf.GGMLQuantizationType[kind]
    file = write_gguf(tmp_path / "m.gguf", tiny(tmp_path), "llama", quantization=quantization)
    convert_gguf(file, tmp_path / "out")
    assert load_file(tmp_path / "out/model.safetensors")["lm_head.weight"].dtype == getattr(torch, dtype)
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == dtype


def test_a_large_model_is_written_in_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(conversion, "MAX_SHARD_BYTES", 50_000)
    model, reports = tiny(tmp_path), []
    convert_gguf(
        write_gguf(tmp_path / "m.gguf", model, "llama"),
        tmp_path / "out",
        progress=lambda done, total: reports.append((done, total)),
    )
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    before, after = loaded(model), loaded(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert reports == sorted(reports) and reports[-1][0] == reports[-1][1]


def test_llama3_scaling_is_recovered_from_its_divisors(tmp_path):
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model = tiny(tmp_path, rope_parameters=dict(rope))
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig(head_dim=16, rope_parameters=dict(rope)), None)
    plain = 1.0 / 500_000.0 ** (torch.arange(0, 16, 2) / 16)
    divisors = (plain / scaled).numpy()
    file = write_gguf(tmp_path / "m.gguf", model, "llama", tensors={"rope_freqs.weight": divisors})
    convert_gguf(file, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["rope_parameters"] == rope

    odd = write_gguf(
        tmp_path / "n.gguf", model, "llama", tensors={"rope_freqs.weight": divisors[::-1].copy()}
    )
    with pytest.raises(UnsupportedModel, match="frequencies"):
        convert_gguf(odd, tmp_path / "odd")


# ------------------------------------------------------------------------------------------- tokenizer


def converted_tokenizer(tmp_path: Path, **metadata):
    fields = {f"tokenizer.{name.replace('__', '.')}": value for name, value in metadata.items()}
    file = write_gguf(tmp_path / "m.gguf", tiny(tmp_path), "llama", metadata=fields)
    convert_gguf(file, tmp_path / "out")
    return AutoTokenizer.from_pretrained(tmp_path / "out")


def test_the_tokenizer_comes_along(tmp_path):
    tokenizer = converted_tokenizer(tmp_path)
    text = "ab cab 12\n日本 😀<|im_end|>"
    ids = tokenizer(text).input_ids
    assert tokenizer.convert_ids_to_tokens(ids[:4]) == ["ab", "Ġ", "c", "ab"]
    assert ids[-1] == tokenizer.eos_token_id == len(TOKENS) - 1
    assert tokenizer.decode(ids) == text
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "<|im_start|>user\nhi<|im_end|>\n"


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["I", "'ll", " pay", " ", " 1234", ".", "\n", "\n", "OK"]),
        ("smollm", ["I", "'ll", " pay", "  ", "1", "2", "3", "4", ".", "\n", "\n", "OK"]),
        ("llama-bpe", ["I", "'ll", " pay", " ", " ", "123", "4", ".\n\n", "OK"]),
        ("qwen2", ["I", "'ll", " pay", " ", " ", "1", "2", "3", "4", ".\n\n", "OK"]),
        ("tekken", ["I", "'ll", " pay", " ", " ", "1", "2", "3", "4", ".\n\n", "OK"]),
    ],
)
def test_text_is_cut_as_the_model_was_trained(pre, pieces, tmp_path):
    """These pieces are all that merges can work on; a digit too many in one of them gives other tokens."""
    backend = converted_tokenizer(tmp_path, ggml__pre=pre).backend_tokenizer
    cut = backend.pre_tokenizer.pre_tokenize_str("I'll pay  1234.\n\nOK")
    assert [piece.replace("Ġ", " ").replace("Ċ", "\n") for piece, _ in cut] == pieces


def test_a_file_without_a_chat_template_has_none(tmp_path):
    assert converted_tokenizer(tmp_path, chat_template=None).chat_template is None


def test_a_beginning_of_sequence_is_added_where_the_file_asks_for_it(tmp_path):
    tokenizer = converted_tokenizer(tmp_path, ggml__pre="llama-bpe", ggml__bos_token_id=258)
    assert tokenizer("ab").input_ids == [258, 256]


# ------------------------------------------------------------------------------------------- bad files


@pytest.mark.parametrize(
    ("metadata", "named"),
    [
        ({"tokenizer.ggml.pre": "unheard-of"}, "unheard-of"),
        ({"tokenizer.ggml.model": "t5"}, "t5"),
        ({"llama.rope.dimension_count": 8}, "rotation of a part"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_would_give_other_tokens_is_refused(metadata, named, tmp_path):
    file = write_gguf(tmp_path / "m.gguf", tiny(tmp_path), "llama", metadata=metadata)
    with pytest.raises(UnsupportedModel, match=named):
        convert_gguf(file, tmp_path / "out")


def test_an_unknown_architecture_is_refused_with_those_that_work(tmp_path):
    file = tmp_path / "m.gguf"
    written(gguf.GGUFWriter(file, "falcon"), file)
    with pytest.raises(UnsupportedModel, match=r"falcon.*llama, mistral, qwen2, qwen3"):
        convert_gguf(file, tmp_path / "out")


def test_a_tensor_that_the_decoder_would_ignore_is_refused(tmp_path):
    expert = {"blk.0.ffn_gate_exps.weight": np.zeros((4, 4), np.float32)}
    file = write_gguf(tmp_path / "m.gguf", tiny(tmp_path), "llama", tensors=expert)
    with pytest.raises(UnsupportedModel, match="ffn_gate_exps"):
        convert_gguf(file, tmp_path / "out")


@pytest.mark.parametrize("missing", ["llama.block_count", "tokenizer.ggml.merges"])
def test_missing_metadata_is_named(missing, tmp_path):
    file = write_gguf(tmp_path / "m.gguf", tiny(tmp_path), "llama", metadata={missing: None})
    with pytest.raises(ConfigError, match=missing.removeprefix("llama.")):
        convert_gguf(file, tmp_path / "out")


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.05, 0.5, 0.99])
def test_a_truncated_file_is_refused_and_leaves_nothing(kept, tmp_path):
    file = write_gguf(tmp_path / "m.gguf", tiny(tmp_path), "llama")
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(ConfigError, match=r"m\.gguf is damaged"):
        convert_gguf(file, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf", "model"]
