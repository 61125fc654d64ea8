"""config.json, read without transformers: what its own classes make of the same file."""

import json
import math
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ingine.engine.models.config import ModelConfig
from ingine.errors import ConfigError, UnsupportedModel
from tests.tiny_models import make_tiny_model
from tests.waiting import HANGS_S

ALL = ("llama", "mistral", "qwen2", "qwen3")
ARCHITECTURES = {arch: f"{arch.capitalize()}ForCausalLM" for arch in ALL}
SIZES = {
    "vocab_size": 1000,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}

# As published, those parts that differ: sizes are SIZES.
PUBLISHED = {
    "Llama-3.2-1B-Instruct": {
        "arch": "llama",
        "attention_bias": False,
        "eos_token_id": [128001, 128008, 128009],
        "head_dim": 16,
        "mlp_bias": False,
        "pretraining_tp": 1,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    },
    "SmolLM2-135M-Instruct": {
        "arch": "llama",
        "eos_token_id": 2,
        "is_llama_config": True,
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    },
    "Mistral-7B-v0.1": {
        "arch": "mistral",
        "eos_token_id": 2,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    },
    "Mistral-7B-Instruct-v0.3": {"arch": "mistral", "rope_theta": 1000000.0, "sliding_window": None},
    "Qwen2.5-1.5B-Instruct": {
        "arch": "qwen2",
        "eos_token_id": 151645,
        "max_window_layers": 21,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
    },
    "Qwen3-0.6B": {
        "arch": "qwen3",
        "attention_bias": False,
        "head_dim": 128,
        "max_window_layers": 28,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
    },
    "a window in some layers": {
        "arch": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 64,
        "max_window_layers": 2,
    },
    "linear, as it used to be written": {
        "arch": "llama",
        "rope_scaling": {"type": "linear", "factor": 2},
        "head_dim": None,
    },
    "yarn": {
        "arch": "qwen2",
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
        "rope_theta": 1e6,
    },
    "Mistral with windows in some layers": {
        "arch": "mistral",
        "sliding_window": 64,
        "layer_types": ["full_attention", "sliding_attention"] * 2,
    },
    "a fine-tune with keys of its own": {
        "arch": "llama",
        "unsloth_version": "2024.9",
        "is_llama_config": True,
        "logits_scaling": 1.0,
        "final_logit_softcapping": None,
        "num_local_experts": 0,
        "no_rope_layers": [1, 1, 1, 1],
        "use_qk_norm": False,
        "quantization_config": None,
        "auto_map": {"AutoModelForCausalLM": "modeling.Model"},
    },
    "as transformers 5 writes it": {
        "arch": "qwen3",
        "dtype": "float16",
        "head_dim": 32,
        "attention_bias": True,
        "layer_types": ["full_attention"] * 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e6},
    },
}


def write_config(folder: Path, arch: str, **values) -> Path:
    config = {"architectures": [ARCHITECTURES[arch]], "model_type": arch, **SIZES, **values}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def assert_as_transformers(folder: Path) -> None:
    """Field by field; rotary frequencies to the last bit."""
    ours, theirs = ModelConfig.from_folder(folder), AutoConfig.from_pretrained(folder)
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert (ours.vocab_size, ours.hidden_size) == (theirs.vocab_size, theirs.hidden_size)
    assert (ours.intermediate_size, ours.num_layers) == (theirs.intermediate_size, theirs.num_hidden_layers)
    assert (ours.num_heads, ours.num_kv_heads) == (theirs.num_attention_heads, theirs.num_key_value_heads)
    assert (ours.head_dim, ours.rms_norm_eps) == (head_dim, theirs.rms_norm_eps)
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.dtype == (theirs.dtype or torch.float32)
    assert ours.output_bias == getattr(theirs, "attention_bias", False)
    layer_types = getattr(theirs, "layer_types", None) or [None] * theirs.num_hidden_layers
    everywhere = theirs.model_type == "mistral" and layer_types[0] is None
    assert ours.sliding_windows == tuple(
        theirs.sliding_window if everywhere or layer_type == "sliding_attention" else None
        for layer_type in layer_types
    )
    inv_freq, scaling = rope_of_transformers(theirs, head_dim)
    assert ours.rope_inv_freq == tuple(inv_freq.tolist())
    assert ours.rope_attention_scaling == scaling


def rope_of_transformers(config: PretrainedConfig, head_dim: int) -> tuple[torch.Tensor, float]:
    if (rope_type := config.rope_parameters["rope_type"]) == "default":  # which each of its models has itself
        return 1.0 / config.rope_parameters["rope_theta"] ** (torch.arange(0, head_dim, 2) / head_dim), 1.0
    return ROPE_INIT_FUNCTIONS[rope_type](config, device=torch.device("cpu"))


@pytest.mark.parametrize("values", PUBLISHED.values(), ids=PUBLISHED)
def test_configs_as_models_are_published_with(values, tmp_path):
    assert_as_transformers(write_config(tmp_path, **values))


@pytest.mark.parametrize("missing", [*SIZES, "head_dim", "sliding_window"])
@pytest.mark.parametrize("arch", ALL)
def test_what_a_config_leaves_out_is_as_transformers_has_it(arch, missing, tmp_path):
    values = {"head_dim": 32, "sliding_window": 16, "num_attention_heads": 32, "num_hidden_layers": 2}
    file = write_config(tmp_path, arch, **values) / "config.json"
    config = json.loads(file.read_text())
    del config[missing]
    file.write_text(json.dumps(config))
    assert_as_transformers(tmp_path)


@pytest.mark.parametrize("seed", range(20))
def test_rotary_frequencies_of_any_size_and_scaling(seed, tmp_path):
    dice = random.Random(seed)
    low = dice.uniform(0.5, 2)
    rope = dice.choice(
        [
            {"rope_type": "linear", "factor": dice.uniform(1, 9)},
            {
                "rope_type": "llama3",
                "factor": dice.uniform(1, 40),
                "low_freq_factor": low,
                "high_freq_factor": low + dice.uniform(0.5, 8),
                "original_max_position_embeddings": dice.choice([64, 2048, 8192]),
            },
        ]
    )
    rope["rope_theta"] = dice.choice([1e4, 5e5, 1e6, 12345.6])
    head_dim = dice.choice([16, 64, 80, 96, 128, 256])
    assert_as_transformers(write_config(tmp_path, "llama", head_dim=head_dim, rope_parameters=rope))


def llama3_rope(*, low: float, high: float) -> dict:
    return {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": low, "high_freq_factor": high}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "cannot share 3"),
        ({"head_dim": 15}, "heads of 15"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings"),
        ({"dtype": "float7"}, "float7"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "freq_factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor is 0"),
        ({"rope_scaling": {"rope_type": "linear", "factor": math.nan}}, "factor is nan"),
        ({"rope_scaling": {"rope_type": "linear", "factor": None}}, "factor is None"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 1e308}}, "rotary"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": math.nan}}, "factor is nan"),
        ({"rope_scaling": llama3_rope(low=4.0, high=4.0)}, "high_freq_factor is 4.0"),
        ({"rope_theta": 0}, "rope_theta is 0"),
        ({"rope_theta": math.nan}, "rope_theta is nan"),
        ({"rope_theta": True}, "rope_theta is True"),
        ({"rms_norm_eps": math.inf}, "rms_norm_eps"),
        ({"hidden_size": 130}, "hidden_size 130"),
        ({"hidden_size": 4}, "hidden_size 4"),
        ({"eos_token_id": "2"}, "eos_token_id"),
        ({"eos_token_id": [2, "x"]}, "eos_token_id"),
        ({"eos_token_id": {"a": 1}}, "eos_token_id"),
        ({"architectures": [5]}, "architectures"),
        ({"architectures": "LlamaForCausalLM"}, "architectures"),
        ({"model_type": 5}, "model_type"),
        ({"rope_scaling": "twice"}, "rotary"),
        ({"rope_theta": "high"}, "rotary"),
        ({"rope_scaling": llama3_rope(low=0, high=4.0)}, "low_freq_factor is 0"),
    ],
    ids=str,
)
def test_a_wrong_value_is_named(changes, says, tmp_path):
    with pytest.raises(ConfigError, match=says) as error:
        ModelConfig.from_folder(write_config(tmp_path, "llama", **changes))
    assert str(tmp_path) in str(error.value)


def test_a_wrong_value_in_generation_config_is_named(tmp_path):
    write_config(tmp_path, "llama")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": ["2"]}')
    with pytest.raises(ConfigError, match=r"(?s)generation_config.*eos_token_id"):
        ModelConfig.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1, 2, 3]}}, "mrope"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "several kinds of layers"),
    ],
    ids=str,
)
def test_positions_that_the_decoder_would_get_wrong_are_refused(changes, says, tmp_path):
    with pytest.raises(UnsupportedModel, match=says):
        ModelConfig.from_folder(write_config(tmp_path, "llama", **changes))


REFUSED = {
    "logit_scale": 0.0625,
    "logits_scaling": 8.0,
    "residual_multiplier": 0.22,
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.015625,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "query_pre_attn_scalar": 256,
    "clip_qkv": 8.0,
    "use_qk_norm": True,
    "alibi": True,
    "rope_interleaved": True,
    "rotary_pct": 0.25,
    "no_rope_layers": [1, 1, 1, 0],
    "attention_chunk_size": 8192,
    "dual_chunk_attention_config": {"chunk_size": 262144},
    "is_causal": False,
    "num_local_experts": 8,
    "mlp_bias": True,
    "use_parallel_residual": True,
    "quantization_config": {"quant_method": "aqlm"},
    "quantization": {"group_size": 64, "bits": 4},
    "compression_config": {"format": "pack-quantized"},
    "model_type": "mistral",
    "hidden_act": "gelu",
}


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
@pytest.mark.parametrize("key", REFUSED)
def test_a_key_that_would_change_numbers_is_refused_by_name(key, arch, tmp_path):
    with pytest.raises(UnsupportedModel, match=key):
        ModelConfig.from_folder(write_config(tmp_path, arch, **{key: REFUSED[key]}))


@pytest.mark.parametrize("arch", ["mistral", "qwen2", "qwen3"])
def test_a_kind_of_layer_that_we_do_not_know_is_refused(arch, tmp_path):
    layer_types = ["full_attention", "chunked_attention"] * 2
    with pytest.raises(UnsupportedModel, match="chunked_attention"):
        ModelConfig.from_folder(write_config(tmp_path, arch, layer_types=layer_types, sliding_window=None))


@pytest.mark.parametrize("arch", ["mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("num_layers", [3, 5])
def test_layer_types_for_another_number_of_layers_are_named(num_layers, arch, tmp_path):
    layer_types = ["full_attention"] * num_layers
    with pytest.raises(ConfigError, match="layer_types"):
        ModelConfig.from_folder(write_config(tmp_path, arch, layer_types=layer_types, sliding_window=None))


def test_sliding_layers_without_use_sliding_window_are_refused(tmp_path):
    """transformers takes the config, and fails at the first token."""
    layer_types = ["full_attention", "sliding_attention"] * 2
    with pytest.raises(ConfigError, match="use_sliding_window"):
        ModelConfig.from_folder(write_config(tmp_path, "qwen2", layer_types=layer_types, sliding_window=64))


@pytest.mark.parametrize("arch", ALL)
def test_a_usual_model_is_started_without_transformers(arch, tmp_path):
    """Importing it takes longer than all else."""
    code = (
        "import sys\nfrom ingine import LLM\nllm = LLM(sys.argv[1], dtype='float32')\n"
        "llm.chat([{'role': 'user', 'content': 'Hi'}])\nprint('transformers' in sys.modules)"
    )
    model = make_tiny_model(tmp_path, arch)
    done = subprocess.run(
        [sys.executable, "-c", code, str(model)], capture_output=True, text=True, timeout=HANGS_S
    )
    assert done.stdout == "False\n", done.stderr
