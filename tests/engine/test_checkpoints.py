"""Checkpoints that differ from what config.json says: loaded as by transformers, or refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ingine import LLM, SamplingParams
from ingine.engine.models import checkpoint
from ingine.errors import ConfigError, UnsupportedModel
from tests.engine.packed import PackedModel, PagedSequence
from tests.engine.test_models import PROMPT, assert_same, hf_logits, load
from tests.tiny_models import make_tiny_model

Weights = dict[str, torch.Tensor]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def edit_weights(path: Path, edit: Callable[[Weights], Weights]) -> None:
    weights = edit(load_file(path / "model.safetensors"))
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def other_matrix(weights: Weights) -> torch.Tensor:
    shape = weights.get(EMBEDDING, weights.get(HEAD)).shape
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.15


def greedy(path: Path) -> list[int]:
    llm = LLM(str(path), dtype="float32", max_num_seqs=2, kv_cache_bytes=1 << 20)
    params = SamplingParams(max_tokens=24, temperature=0)
    return llm.generate({"prompt_token_ids": PROMPT}, params)[0].outputs[0].token_ids


def hf_greedy(path: Path) -> list[int]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    prompt = torch.tensor([PROMPT])
    output = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, do_sample=False, pad_token_id=0
    )
    return output[0, len(PROMPT) :].tolist()


HEADS = {
    "another head": lambda weights: weights | {HEAD: other_matrix(weights)},
    "the same head once more": lambda weights: weights | {HEAD: weights[EMBEDDING].clone()},
    "the same head in another type": lambda weights: weights | {HEAD: weights[EMBEDDING].half()},
    "the head alone": lambda weights: {
        HEAD if name == EMBEDDING else name: weight for name, weight in weights.items()
    },
    "a head that differs in its last row": lambda weights: (
        weights | {HEAD: torch.cat((weights[EMBEDDING][:-1], weights[EMBEDDING][:1]))}
    ),
}


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
@pytest.mark.parametrize("edit", HEADS.values(), ids=HEADS)
def test_a_tied_model_has_the_head_that_transformers_gives_it(edit, arch, tmp_path):
    path = make_tiny_model(tmp_path, arch, tie_word_embeddings=True)
    edit_weights(path, edit)
    [logits] = PackedModel(load(path)).step((PagedSequence(PROMPT), len(PROMPT)))
    assert_same(logits, hf_logits(path, PROMPT))
    assert greedy(path) == hf_greedy(path)


def test_a_head_in_another_file_than_the_embedding(tmp_path):
    path = make_tiny_model(tmp_path, tie_word_embeddings=True)
    weights = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    save_file(weights, path / "a.safetensors", metadata={"format": "pt"})
    save_file({HEAD: other_matrix(weights)}, path / "b.safetensors", metadata={"format": "pt"})
    weight_map = dict.fromkeys(weights, "a.safetensors") | {HEAD: "b.safetensors"}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert greedy(path) == hf_greedy(path)


def test_a_matrix_that_is_compared_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_ROWS_AT_ONCE", 100)
    path = make_tiny_model(tmp_path, tie_word_embeddings=True)
    edit_weights(path, HEADS["a head that differs in its last row"])
    assert greedy(path) == hf_greedy(path)
    assert checkpoint.SafetensorsCheckpoint(path).has_a_head_of_its_own()


def test_a_model_that_is_not_tied_after_all_says_so(tmp_path, caplog):
    path = make_tiny_model(tmp_path, tie_word_embeddings=True)
    load(path)
    assert not caplog.messages
    edit_weights(path, HEADS["another head"])
    load(path)
    assert any("tie_word_embeddings" in message for message in caplog.messages)


@pytest.mark.parametrize("missing", [EMBEDDING, HEAD])
def test_a_matrix_is_not_made_up_where_the_model_has_two(missing, tmp_path):
    """transformers draws it at random, with a warning."""
    path = make_tiny_model(tmp_path)
    edit_weights(path, lambda weights: {name: w for name, w in weights.items() if name != missing})
    with pytest.raises(ConfigError, match=f"missing: {missing}"):
        load(path)


def test_a_tied_model_with_neither_matrix_is_refused(tmp_path):
    path = make_tiny_model(tmp_path, tie_word_embeddings=True)
    edit_weights(path, lambda weights: {name: w for name, w in weights.items() if name != EMBEDDING})
    with pytest.raises(ConfigError, match=f"missing: {EMBEDDING}"):
        load(path)


def test_a_head_of_another_shape_is_refused_as_by_transformers(tmp_path):
    path = make_tiny_model(tmp_path, tie_word_embeddings=True)
    edit_weights(path, lambda weights: weights | {HEAD: torch.zeros(1, 1)})
    with pytest.raises(ConfigError, match=r"lm_head.weight is \[1, 1\], config.json says \[259, 64\]"):
        load(path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        hf_logits(path, PROMPT)


def test_rotary_frequencies_of_old_llamas_are_ignored_as_by_transformers(tmp_path):
    path = make_tiny_model(tmp_path)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_weights(path, lambda weights: weights | {name: torch.zeros(8)})
    assert greedy(path) == hf_greedy(path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn], ids=str)
def test_weights_in_a_type_that_is_no_plain_float_are_refused(dtype, tmp_path):
    """Their scales may lie anywhere; as they are they would be wrong numbers."""
    path = make_tiny_model(tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"
    edit_weights(path, lambda weights: weights | {name: weights[name].to(dtype)})
    with pytest.raises(UnsupportedModel, match=rf"{name} in .*not quantised"):
        load(path)


def test_a_tensor_in_two_files_is_named(tmp_path):
    path = make_tiny_model(tmp_path, max_shard_size="60KB")
    index = json.loads((path / "model.safetensors.index.json").read_text())
    one, *_, other = sorted(set(index["weight_map"].values()))
    weights = load_file(path / one)
    save_file(load_file(path / other) | weights, path / other, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=f"{other}: {sorted(weights)[0]} is in {one} too"):
        load(path)


def test_of_one_file_and_shards_transformers_takes_the_file(tmp_path):
    path = make_tiny_model(tmp_path, max_shard_size="60KB")
    make_tiny_model(tmp_path / "one", seed=1)
    shutil.copy(tmp_path / "one/model.safetensors", path)
    assert greedy(path) == hf_greedy(path) == hf_greedy(tmp_path / "one")


# --------------------------------------------------------------------------------------- other formats


@pytest.mark.parametrize("file", ["pytorch_model.bin", "pytorch_model.bin.index.json"])
def test_weights_in_pytorch_s_format_come_with_the_command_that_converts_them(file, tmp_path):
    path = make_tiny_model(tmp_path / "model")
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    if file != "pytorch_model.bin":
        names = load_file(path / "model.safetensors")
        weight_map = dict.fromkeys(names, "pytorch_model-00001-of-00001.bin")
        (path / "pytorch_model.bin").rename(path / "pytorch_model-00001-of-00001.bin")
        (path / file).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (path / "model.safetensors").unlink()
    expected = hf_greedy(path)
    with pytest.raises(ConfigError, match=r"no safetensors.*pytorch_model\S*\.bin") as error:
        load(path)

    code = str(error.value).split('python -c "')[1].split('"')[0].replace("NEW_FOLDER", str(tmp_path / "new"))
    exec(code, {})  # in this process: importing transformers anew takes many seconds
    assert greedy(tmp_path / "new") == expected


def test_a_folder_without_weights_says_which_file_it_looked_for(tmp_path):
    """A hub's pytorch_model.bin is not even downloaded, so the command is there without one, too."""
    path = make_tiny_model(tmp_path)
    (path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"model\.safetensors does not exist.*from_pretrained\('MODEL'\)"):
        load(path)


# -------------------------------------------------------------------------------------- ends of a text


def test_what_ends_a_text_is_what_any_of_a_model_s_files_calls_so(tmp_path):
    path = make_tiny_model(tmp_path)  # config.json: 258
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    config = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "<|im_start|>"}))
    llm = LLM(str(path), dtype="float32", max_num_seqs=2, kv_cache_bytes=1 << 20)

    def reason(token_id: int) -> str:
        params = SamplingParams(max_tokens=2, temperature=0, logit_bias={token_id: 100.0})
        return llm.generate({"prompt_token_ids": PROMPT}, params)[0].outputs[0].finish_reason

    assert [reason(token_id) for token_id in (258, 7, 8, 257)] == ["stop"] * 4
    assert reason(9) == "length"
