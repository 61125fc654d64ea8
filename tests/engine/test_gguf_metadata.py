"""Metadata of GGUF files that decides what a model computes or says: read, or refused by name."""

import json
import logging
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ingine import LLM, SamplingParams
from ingine.engine.models.config import ModelConfig
from ingine.engine.models.gguf import convert_gguf
from ingine.engine.text.tokenizer import Tokenizer
from ingine.errors import ConfigError, UnsupportedModel
from tests.engine.test_gguf import TOKENS, TYPES, add_metadata, tiny, write_gguf, written
from tests.engine.test_tokenizer import sentencepiece_like
from tests.tiny_models import make_tiny_model

IM_END = len(TOKENS) - 1


def converted(tmp_path: Path, arch: str = "llama", *, tensors=None, model=None, **metadata: Any) -> Path:
    """Keys with a dot as `rope__freq_base`, of the architecture's own metadata but for `tokenizer`'s."""
    keys = {name.replace("__", "."): value for name, value in metadata.items()}
    fields = {
        key if key.startswith(("tokenizer.", "general.")) else f"{arch}.{key}": value
        for key, value in keys.items()
    }
    model = model or tiny(tmp_path, arch)
    file = write_gguf(tmp_path / "m.gguf", model, arch, metadata=fields, tensors=tensors)
    convert_gguf(file, tmp_path / "out")
    return tmp_path / "out"


def read(folder: Path, name: str = "config") -> dict:
    return json.loads((folder / f"{name}.json").read_text())


# --------------------------------------------------------------------------------------- the allow-list


@pytest.mark.parametrize(
    ("arch", "key", "value"),
    [
        ("llama", "attention.scale", 0.5),
        ("llama", "logit_scale", 0.1),
        ("llama", "attention.causal", False),
        ("llama", "expert_count", 8),
        ("llama", "attn_logit_softcapping", 50.0),
        ("llama", "rope.scaling.attn_factor", 1.5),
        ("llama", "rope.scaling.yarn_log_multiplier", 0.1),
        ("llama", "rope.dimension_sections", [16, 24, 24, 0]),
        ("llama", "attention.value_length", 8),
        ("llama", "rope.dimension_count", 8),
        ("qwen2", "attention.sliding_window", 64),
        ("qwen3", "attention.sliding_window_pattern", 2),
        ("qwen3", "a_key_of_next_month", 1),
    ],
)
def test_what_may_change_numbers_and_is_not_understood_is_refused_by_name(arch, key, value, tmp_path):
    says = "rotation of a part" if key == "rope.dimension_count" else key
    with pytest.raises(UnsupportedModel, match=says):
        converted(tmp_path, arch, **{key: value})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("vocab_size", 4711),
        ("rope.scaling.finetuned", True),
        ("tensor_data_layout", "Meta AI original pth"),
        ("attention.layer_norm_epsilon", 1e-5),
        ("attention.causal", True),
        ("expert_count", 0),
        ("rope.scaling.attn_factor", 1.0),
        ("attention.value_length", 16),
    ],
)
def test_what_is_known_to_change_nothing_changes_nothing(key, value, tmp_path):
    for name in ("with", "without"):
        (tmp_path / name).mkdir()
    without = converted(tmp_path / "without")
    assert read(converted(tmp_path / "with", **{key: value})) == read(without)


def test_metadata_of_other_architectures_is_not_this_model_s(tmp_path):
    file = write_gguf(tmp_path / "m.gguf", tiny(tmp_path), "llama", metadata={"clip.has_vision_encoder": 1})
    convert_gguf(file, tmp_path / "out")


@pytest.mark.parametrize(
    ("key", "value", "error"),
    [
        ("block_count", "two", ConfigError),
        ("attention.head_count", True, ConfigError),
        ("attention.head_count_kv", [2, 1], UnsupportedModel),
        ("attention.layer_norm_rms_epsilon", None, ConfigError),
        ("rope.scaling.type", 5, ConfigError),
    ],
)
def test_metadata_of_the_wrong_type_is_named(key, value, error, tmp_path):
    with pytest.raises(error, match=key):
        converted(tmp_path, **{key: value})


# -------------------------------------------------------------------------------- positions and windows

LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}


@pytest.mark.parametrize(
    ("rope", "metadata"),
    [
        (LINEAR, {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}),
        (LINEAR, {"rope.scaling.factor": 4.0}),
        (LINEAR, {"rope.scale_linear": 4.0}),
        (LINEAR, {"rope.scale_linear": 2.0, "rope.scaling.factor": 4.0}),
        (
            YARN,
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 128,
            },
        ),
        (
            YARN | {"original_max_position_embeddings": 512},
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0},
        ),
        (
            YARN | {"beta_fast": 16.0, "beta_slow": 2.0},
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 128,
                "rope.scaling.yarn_beta_fast": 16.0,
                "rope.scaling.yarn_beta_slow": 2.0,
            },
        ),
        ({"rope_type": "default"}, {"rope.scaling.type": "none", "rope.scaling.factor": 4.0}),
        ({"rope_type": "default"}, {"rope.scale_linear": 1.0}),
        ({"rope_type": "default"}, {"rope.scaling.factor": 0.0}),
        ({"rope_type": "default"}, {"rope.scaling.type": "yarn"}),
    ],
    ids=str,
)
def test_scaled_positions_are_those_of_transformers(rope, metadata, tmp_path):
    model = tiny(tmp_path, rope_parameters={"rope_theta": 10_000.0, **rope})
    out = converted(tmp_path, model=model, **metadata)
    ours, original = ModelConfig.from_folder(out), ModelConfig.from_folder(model)
    assert ours.rope_inv_freq == original.rope_inv_freq
    assert ours.rope_attention_scaling == original.rope_attention_scaling
    assert ours.max_position_embeddings == original.max_position_embeddings

    prompt = torch.arange(0, 200)[None]
    with torch.inference_mode():
        expected = AutoModelForCausalLM.from_pretrained(model)(prompt).logits
        logits = AutoModelForCausalLM.from_pretrained(out)(prompt).logits
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("rope_type", ["longrope", "dynamic"])
def test_scaling_that_depends_on_the_length_is_refused(rope_type, tmp_path):
    with pytest.raises(UnsupportedModel, match=rf"rope\.scaling\.type = '{rope_type}'"):
        converted(tmp_path, **{"rope.scaling.type": rope_type, "rope.scaling.factor": 4.0})


def test_two_kinds_of_scaling_at_once_are_refused(tmp_path):
    divisors = {"rope_freqs.weight": np.ones(8, np.float32)}
    with pytest.raises(UnsupportedModel, match=r"rope_freqs\.weight and linear"):
        converted(tmp_path, tensors=divisors, **{"rope.scaling.factor": 4.0})


def test_divisors_of_one_leave_the_frequencies_as_they_are(tmp_path):
    plain = ModelConfig.from_folder(tiny(tmp_path))
    out = converted(tmp_path, tensors={"rope_freqs.weight": np.ones(8, np.float32)})
    assert ModelConfig.from_folder(out).rope_inv_freq == plain.rope_inv_freq


@pytest.mark.parametrize("divisors", [[2.0] * 8, [1.0] * 4], ids=str)
def test_divisors_that_are_not_llama_3_s_are_refused(divisors, tmp_path):
    with pytest.raises(UnsupportedModel, match="rotary frequencies"):
        converted(tmp_path, tensors={"rope_freqs.weight": np.array(divisors, np.float32)})


@pytest.mark.parametrize("arch", ["mistral", "llama"])
def test_a_sliding_window_is_kept(arch, tmp_path):
    """Most files of Mistral call themselves llama."""
    model = tiny(tmp_path, "mistral", sliding_window=6)
    out = converted(tmp_path, arch, model=model, attention__sliding_window=6)
    assert ModelConfig.from_folder(out).sliding_windows == (6, 6)
    prompt = torch.arange(0, 40)[None]
    with torch.inference_mode():
        expected = AutoModelForCausalLM.from_pretrained(model)(prompt).logits
        logits = AutoModelForCausalLM.from_pretrained(out)(prompt).logits
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("arch", ["mistral", "llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("window", [0, 512, 4096])
def test_a_window_that_the_context_fits_into_is_none(arch, window, tmp_path):
    out = converted(tmp_path, arch, attention__sliding_window=window)
    assert ModelConfig.from_folder(out).sliding_windows == (None, None)


# --------------------------------------------------------------------------------------- ends of a text


def ends(tmp_path: Path, **metadata: Any) -> list[int]:
    out = converted(tmp_path, **{f"tokenizer__ggml__{key}": value for key, value in metadata.items()})
    return read(out, "generation_config")["eos_token_id"]


def test_the_ends_of_sequence_turn_and_message_are_ends(tmp_path):
    plain = [1] * len(TOKENS)
    found = ends(tmp_path, eos_token_id=5, eot_token_id=6, eom_token_id=7, token_type=plain)
    assert found == [5, 6, 7]


def test_control_tokens_that_end_a_turn_in_known_families_are_ends(tmp_path):
    """The file names the base model's end alone; its chat template ends turns with <|im_end|>."""
    base = TOKENS.index("<|endoftext|>")
    assert ends(tmp_path, eos_token_id=base) == [base, IM_END]


@pytest.mark.parametrize("token", ["<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>", "<EOT>", "</s>"])
def test_the_ends_of_a_turn_of_other_families(token, tmp_path):
    tokens = [*TOKENS[:-3], token, *TOKENS[-2:]]
    assert len(TOKENS) - 3 in ends(tmp_path, tokens=tokens)


def test_a_token_that_only_looks_like_an_end_is_none(tmp_path):
    """<|im_start|> begins a turn; <|im_end|> as an ordinary token is what a user may write."""
    assert ends(tmp_path, eos_token_id=5, token_type=[*TYPES[:-3], 1, 3, 1]) == [5]


def test_a_chat_model_stops_at_the_end_of_its_turn(tmp_path):
    """Through the engine: the head is made to say <|im_end|> at once."""
    model = make_tiny_model(tmp_path / "model", vocab_size=len(TOKENS))
    head = np.zeros((len(TOKENS), 64), np.float32)
    embedding = np.ones((len(TOKENS), 64), np.float32)
    head[IM_END] = 1
    norm = np.ones(64, np.float32)
    zeros = {
        f"blk.{layer}.{name}.weight": np.zeros(shape, np.float32)
        for layer in range(2)
        for name, shape in (("attn_output", (64, 64)), ("ffn_down", (64, 96)))
    }
    tensors = {"output.weight": head, "token_embd.weight": embedding, "output_norm.weight": norm, **zeros}
    base = TOKENS.index("<|endoftext|>")
    out = converted(tmp_path, model=model, tensors=tensors, tokenizer__ggml__eos_token_id=base)
    llm = LLM(str(out), dtype="float32", kv_cache_bytes=1 << 20, max_num_seqs=1)
    output = llm.chat([{"role": "user", "content": "hi"}], SamplingParams(max_tokens=5, temperature=0))[0]
    assert (output.outputs[0].token_ids, output.outputs[0].finish_reason) == ([IM_END], "stop")


@pytest.mark.parametrize("role", ["bos", "eos", "eot", "unknown", "padding"])
@pytest.mark.parametrize("token_id", [len(TOKENS), 2**32 - 1])
def test_a_token_id_beyond_the_vocabulary_is_named(role, token_id, tmp_path):
    with pytest.raises(ConfigError, match=rf"tokenizer\.ggml\.{role}_token_id is {token_id}"):
        converted(tmp_path, **{f"tokenizer.ggml.{role}_token_id": token_id})


def test_what_the_makers_recommend_for_sampling_comes_along(tmp_path):
    recommended = {"general.sampling.temp": 0.5, "general.sampling.top_k": 20, "general.sampling.mirostat": 2}
    found = read(converted(tmp_path, **recommended), "generation_config")
    assert found == {"eos_token_id": [IM_END, IM_END - 2], "temperature": 0.5, "top_k": 20}


# -------------------------------------------------------------------------------------- the tokenizer


@pytest.mark.parametrize("pre", [None, "default"])
def test_a_file_that_does_not_say_how_text_is_cut_gives_a_warning(pre, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        converted(tmp_path, tokenizer__ggml__pre=pre)
    [record] = caplog.records
    assert "tokenizer.ggml.pre" in record.message and "m.gguf" in record.message


def test_a_file_that_says_it_gives_no_warning(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        converted(tmp_path)
    assert not caplog.records


def test_an_end_of_sequence_is_added_where_the_file_asks_for_it(tmp_path):
    out = converted(tmp_path, tokenizer__ggml__add_eos_token=True, tokenizer__ggml__bos_token_id=258)
    assert AutoTokenizer.from_pretrained(out)("ab").input_ids == [256, IM_END]


@pytest.mark.parametrize("key", ["add_sep_token", "remove_extra_whitespaces", "suppress_tokens"])
def test_a_way_of_cutting_text_that_is_not_implemented_is_refused(key, tmp_path):
    with pytest.raises(UnsupportedModel, match=key):
        converted(tmp_path, **{f"tokenizer.ggml.{key}": True})


@pytest.mark.parametrize("kind", [None, "none", "no_vocab"])
def test_a_file_without_a_tokenizer_gives_a_folder_without(kind, tmp_path):
    nothing = dict.fromkeys(("pre", "tokens", "merges", "token_type"))
    metadata = {f"tokenizer__ggml__{key}": value for key, value in (nothing | {"model": kind}).items()}
    out = converted(tmp_path, **metadata)
    assert not list(out.glob("tokenizer*"))
    assert read(out, "generation_config")["eos_token_id"] == [IM_END]


def sentencepiece_file(tmp_path: Path, **metadata: Any) -> Path:
    """A vocabulary as Llama 2 has it, in a file without weights."""
    vocab = sentencepiece_like().get_vocab()
    tokens = sorted(vocab, key=vocab.get)
    fields = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259),
        "tokenizer.ggml.scores": [0.0] * 259 + [-1.0, -2.0, -3.0, -0.5, -0.4],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.pre": None,
        "tokenizer.ggml.merges": None,
    } | {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
    model = make_tiny_model(tmp_path / "model", vocab_size=len(tokens))
    return write_gguf(tmp_path / "m.gguf", model, "llama", metadata=fields)


@pytest.mark.parametrize(
    ("metadata", "tokens", "text"),
    [
        ({}, ["<s>", "▁", "ab", "▁a"], "ab a"),
        ({"add_bos_token": False}, ["▁", "ab", "▁a"], "ab a"),
        ({"add_eos_token": True}, ["<s>", "▁", "ab", "▁a", "</s>"], "ab a"),
        ({"add_space_prefix": False}, ["<s>", "ab", "▁a"], "ab a"),
        ({"add_space_prefix": False}, ["<s>", "▁", "ab"], " ab"),
    ],
    ids=str,
)
def test_sentencepiece_cuts_text_as_the_file_says(metadata, tokens, text, tmp_path):
    convert_gguf(sentencepiece_file(tmp_path, **metadata), tmp_path / "out")
    tokenizer = Tokenizer.from_folder(tmp_path / "out")
    ids = AutoTokenizer.from_pretrained(tmp_path / "out").convert_tokens_to_ids(tokens)
    assert tokenizer.encode(text) == ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_ids == {2}


# --------------------------------------------------------------------------------------- whole or not


@pytest.mark.parametrize("missing", ["blk.1.ffn_down.weight", "output_norm.weight"])
def test_a_file_that_lacks_a_tensor_is_refused_and_leaves_nothing(missing, tmp_path):
    with pytest.raises(ConfigError, match="weights are missing: model"):
        converted(tmp_path, tensors={missing: None})
    assert not list(tmp_path.glob("out*"))


def test_a_tensor_of_the_wrong_shape_is_refused(tmp_path):
    wrong = {"blk.0.ffn_down.weight": np.zeros((64, 32), np.float32)}
    with pytest.raises(ConfigError, match=r"blk\.0\.ffn_down\.weight is \[64, 32\].*\[64, 96\]"):
        converted(tmp_path, tensors=wrong)


def test_a_bias_that_the_model_has_no_place_for_is_refused(tmp_path):
    bias = {"blk.0.ffn_up.bias": np.zeros(96, np.float32)}
    with pytest.raises(UnsupportedModel, match=r"blk\.0\.ffn_up\.bias"):
        converted(tmp_path, tensors=bias)


def test_a_file_without_an_embedding_is_refused(tmp_path):
    file = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    for key in ("block_count", "embedding_length", "feed_forward_length", "attention.head_count"):
        add_metadata(writer, f"llama.{key}", 4)
    add_metadata(writer, "llama.context_length", 64)
    with pytest.raises(ConfigError, match=r"lacks the tensor token_embd\.weight"):
        convert_gguf(written(writer, file), tmp_path / "out")
