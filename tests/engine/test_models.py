"""Our decoder against Hugging Face's, logits in float32, over the ways that a scheduler may cut the work."""

import json
import re
import weakref
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ingine.engine.kernels.attention import AttentionMetadata
from ingine.engine.kernels.layers.linear import Linear
from ingine.engine.kernels.layers.weights import Product, WeightFormat
from ingine.engine.kernels.select import REFERENCE
from ingine.engine.models.config import ModelConfig
from ingine.engine.models.decoder import Decoder
from ingine.engine.models.loader import load_model, load_weights
from ingine.engine.models.registry import ARCHITECTURES
from ingine.errors import ConfigError, UnsupportedModel
from tests.engine.packed import PackedModel, PagedSequence, forward_by_length
from tests.tiny_models import EOS_TOKEN_ID, make_tiny_model

ALL = ("llama", "mistral", "qwen2", "qwen3")
PROMPT = list(range(40, 77))


def load(path, dtype=torch.float32) -> Decoder:
    return load_model(path, dtype=dtype, device=torch.device("cpu"), kernels=REFERENCE)


def load_unpacked(path) -> Decoder:
    return load_weights(path, dtype=torch.float32, device=torch.device("cpu"), kernels=REFERENCE)


@torch.inference_mode()
def hf_logits(path, token_ids: list[int]) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model(torch.tensor([token_ids])).logits[0]


def assert_same(ours: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-4)


@pytest.fixture(scope="module", params=ALL)
def tiny(request, tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp(request.param), request.param)


def edit_config(path, **changes) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# ------------------------------------------------------------------------------------- equality with HF


def test_one_prefill(tiny):
    [logits] = PackedModel(load(tiny)).step((PagedSequence(PROMPT), len(PROMPT)))
    assert logits.dtype == torch.float32
    assert_same(logits, hf_logits(tiny, PROMPT))


@pytest.mark.parametrize("chunk", [1, 5, 36])
@pytest.mark.parametrize("block_size", [1, 8])
def test_chunked_prefill(tiny, chunk, block_size):
    packed, sequence = PackedModel(load(tiny), block_size=block_size), PagedSequence(PROMPT)
    logits = []
    while remaining := len(PROMPT) - sequence.num_computed_tokens:
        logits += packed.step((sequence, min(chunk, remaining)))
    assert_same(torch.cat(logits), hf_logits(tiny, PROMPT))


def test_decodes_and_prefills_in_one_batch(tiny):
    packed = PackedModel(load(tiny))
    a, b, c = PagedSequence(PROMPT), PagedSequence(PROMPT[::-1]), PagedSequence([7])
    a1, b1 = packed.step((a, 20), (b, 4))
    a2, b2, c1 = packed.step((a, 1), (b, 9), (c, 1))
    b3, a3 = packed.step((b, 1), (a, 1))
    for rows, sequence in (((a1, a2, a3), a), ((b1, b2, b3), b), ((c1,), c)):
        computed = sequence.token_ids[: sequence.num_computed_tokens]
        assert_same(torch.cat(rows), hf_logits(tiny, computed))


def test_linear_layers_can_tell_the_sequences_of_a_step_apart(tiny, monkeypatch):
    model, without_a_step = load(tiny), set()

    def forward(linear: Linear, x: torch.Tensor, metadata: AttentionMetadata | None = None) -> torch.Tensor:
        if metadata is None:
            without_a_step.add(linear)
        return forward_by_length(linear, x, metadata)

    monkeypatch.setattr(Linear, "forward", forward)

    def compute(*indices: int) -> list[list[torch.Tensor]]:
        """The logits of each step, a step for each column of `cuts`."""
        sequences = [PagedSequence([PROMPT, PROMPT[::-1], [7, 8, 9]][index]) for index in indices]
        cuts = [[(20, 1, 1), (4, 9, 1), (1, 1, 1)][index] for index in indices]
        packed = PackedModel(model)
        return [packed.step(*zip(sequences, counts, strict=True)) for counts in zip(*cuts, strict=True)]

    together = compute(0, 1, 2)
    for index in range(3):
        for step, [alone] in zip(together, compute(index), strict=True):
            assert_same(step[index], alone)
    assert without_a_step == {model.lm_head}


def test_a_shared_prefix_is_computed_once(tiny):
    packed = PackedModel(load(tiny), block_size=4)
    first = PagedSequence(PROMPT)
    packed.step((first, 16))
    second = PagedSequence([*PROMPT[:16], 1, 2, 3], first.block_table[:4], num_computed_tokens=16)
    _, logits = packed.step((first, 5), (second, 3))
    assert_same(logits, hf_logits(tiny, second.token_ids)[16:])


@pytest.mark.parametrize("arch", ["mistral", "qwen2", "qwen3"])
def test_a_sliding_window_shorter_than_the_sequence(arch, tmp_path):
    path = make_tiny_model(tmp_path, arch, sliding_window=6)
    assert 6 in ModelConfig.from_folder(path).sliding_windows
    packed, sequence = PackedModel(load(path)), PagedSequence(PROMPT)
    logits = packed.step((sequence, 20)) + packed.step((sequence, 16)) + packed.step((sequence, 1))
    assert_same(torch.cat(logits), hf_logits(path, PROMPT))


def test_a_mistral_with_windows_in_some_layers(tmp_path):
    """transformers takes another class for it; a layer is the same."""
    path = make_tiny_model(tmp_path, "mistral", sliding_window=6)
    edit_config(path, layer_types=["full_attention", "sliding_attention"])
    assert ModelConfig.from_folder(path).sliding_windows == (None, 6)
    [logits] = PackedModel(load(path)).step((PagedSequence(PROMPT), len(PROMPT)))
    assert_same(logits, hf_logits(path, PROMPT))


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_scaled_rope(rope, tmp_path):
    path = make_tiny_model(tmp_path / "scaled", rope_parameters={"rope_theta": 10_000.0, **rope})
    plain = make_tiny_model(tmp_path / "plain")
    [logits] = PackedModel(load(path)).step((PagedSequence(PROMPT), len(PROMPT)))
    assert_same(logits, hf_logits(path, PROMPT))
    assert not torch.allclose(logits, hf_logits(plain, PROMPT), atol=1e-2)


@pytest.mark.parametrize("arch", ALL)
def test_tied_embeddings(arch, tmp_path):
    path = make_tiny_model(tmp_path, arch, tie_word_embeddings=True)
    model = load_unpacked(path)
    assert model.lm_head.weight is model.embed_tokens
    model.pack_weights()
    [logits] = PackedModel(model).step((PagedSequence(PROMPT), len(PROMPT)))
    assert_same(logits, hf_logits(path, PROMPT))


def test_bfloat16_is_close(tiny):
    [logits] = PackedModel(load(tiny, torch.bfloat16)).step((PagedSequence(PROMPT), len(PROMPT)))
    expected = hf_logits(tiny, PROMPT)
    assert (logits - expected).abs().mean() < 0.05 * expected.abs().mean()


# --------------------------------------------------------------------------------------------- loading


def test_sharded_safetensors_give_the_same_model(tmp_path):
    whole = make_tiny_model(tmp_path / "whole")
    sharded = make_tiny_model(tmp_path / "sharded", max_shard_size="60KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    expected = load_unpacked(whole).checkpoint_tensors()
    tensors = load_unpacked(sharded).checkpoint_tensors()
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


class ForgetfulWeights(WeightFormat):
    """Keeps nothing, and notes how many matrices that it was given are still there with each one."""

    name = "forgetful"

    def __init__(self):
        self.num_alive: list[int] = []
        self._given: list[weakref.ref] = []

    def pack(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
        self._given.append(weakref.ref(weight))
        self.num_alive.append(sum(each() is not None for each in self._given))
        return lambda x: x


def test_a_matrix_is_packed_and_forgotten_before_the_next_one_is_read(tmp_path):
    path, weights = make_tiny_model(tmp_path), ForgetfulWeights()
    kernels = replace(REFERENCE, weights=weights)
    load_model(path, dtype=torch.float32, device=torch.device("cpu"), kernels=kernels)
    assert weights.num_alive == [1] * (2 * 4 + 1)  # four of each layer, and the output matrix


def test_config_has_what_the_engine_needs(tmp_path):
    path = make_tiny_model(tmp_path, "qwen3", max_position_embeddings=321)
    config = ModelConfig.from_folder(path)
    assert (config.architecture, config.num_layers, config.max_position_embeddings) == (
        "Qwen3ForCausalLM",
        2,
        321,
    )
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (4, 2, 16)
    assert config.dtype == torch.float32
    assert load(path).bytes_per_block(8) == 2 * (2 * 8 * 2 * 16 * 4)


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_type": "default"}, 512),
        ({"rope_type": "linear", "factor": 4.0}, 2048),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 300}, 1200),
        ({"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 300}, 512),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
            512,
        ),
    ],
    ids=lambda value: value["rope_type"] if isinstance(value, dict) else "",
)
def test_scaled_rope_makes_longer_sequences(rope, expected, tmp_path):
    path = make_tiny_model(tmp_path, rope_parameters={"rope_theta": 10_000.0, **rope})
    assert ModelConfig.from_folder(path).max_position_embeddings == expected


def test_end_of_sequence_ids_come_from_both_config_files(tmp_path):
    path = make_tiny_model(tmp_path)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, EOS_TOKEN_ID]}))
    assert ModelConfig.from_folder(path).eos_token_ids == (EOS_TOKEN_ID, 5)
    (path / "generation_config.json").unlink()
    assert ModelConfig.from_folder(path).eos_token_ids == (EOS_TOKEN_ID,)


def test_an_unknown_architecture_is_refused_with_those_that_work(tmp_path):
    path = make_tiny_model(tmp_path)
    edit_config(path, architectures=["FalconForCausalLM"])
    with pytest.raises(UnsupportedModel) as error:
        load(path)
    assert all(name in str(error.value) for name in ("FalconForCausalLM", *ARCHITECTURES))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic"),
        (
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "original_max_position_embeddings": 16,
                    "short_factor": [1.0] * 8,
                    "long_factor": [2.0] * 8,
                }
            },
            "longrope",
        ),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 3}}, "GPTQ with bits = 3"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_feature_that_would_be_left_out_is_refused_by_name(changes, named, tmp_path):
    path = make_tiny_model(tmp_path)
    edit_config(path, **changes)
    with pytest.raises(UnsupportedModel, match=named):
        load(path)


def test_missing_and_unexpected_weights_are_named(tmp_path):
    path = make_tiny_model(tmp_path)
    weights = load_file(path / "model.safetensors")
    norm = weights.pop("model.layers.1.input_layernorm.weight")
    save_file(weights, path / "model.safetensors")
    with pytest.raises(ConfigError, match=re.escape("missing: model.layers.1.input_layernorm.weight")):
        load(path)
    save_file({**weights, "model.layers.9.input_layernorm.weight": norm}, path / "model.safetensors")
    with pytest.raises(ConfigError, match=re.escape("model.layers.9.input_layernorm.weight")):
        load(path)


def test_a_weight_of_the_wrong_shape_is_named(tmp_path):
    path = make_tiny_model(tmp_path)
    edit_config(path, intermediate_size=80)
    with pytest.raises(ConfigError, match=r"mlp\..*_proj.weight is .*, config.json says"):
        load(path)


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty"])
def test_a_damaged_file_is_named(damage, tmp_path):
    path = make_tiny_model(tmp_path)
    file = path / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(
        {"truncated": content[: len(content) // 2], "garbage": b"not this" * 99, "empty": b""}[damage]
    )
    with pytest.raises(ConfigError, match=r"model\.safetensors is damaged"):
        load(path)


def test_missing_files_are_named(tmp_path):
    path = make_tiny_model(tmp_path, max_shard_size="60KB")
    shard = sorted(path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ConfigError, match=shard.name):
        load(path)
    (path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ConfigError, match="weight_map"):
        load(path)
    (path / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"config\.json does not exist"):
        load(path)


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"architectures": ["LlamaForCausalLM"], "hidden_size": "wide", "model_type": "llama"}'],
)
def test_a_config_that_is_wrong_is_named(content, tmp_path):
    path = make_tiny_model(tmp_path)
    (path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"config\.json"):
        load(path)
