"""Which kernels a model gets."""

import logging

import pytest
import torch
from transformers import LlamaConfig

from ingine.attention import NativeAttention, TorchAttention
from ingine.config import EngineConfig
from ingine.engine import Engine
from ingine.errors import ConfigError
from ingine.kernels import select_kernels
from tests.engine.marks import needs_native

CPU = torch.device("cpu")


def test_the_choice_of_kernels_is_logged_in_one_line(caplog):
    with caplog.at_level(logging.INFO, logger="ingine.kernels"):
        kernels = select_kernels(CPU, torch.float32)
    assert [record.message for record in caplog.records] == [
        f"kernels on cpu, float32: attention {kernels.attention.name}, layer operations {kernels.ops.name}, "
        f"weights {kernels.weights.name}"
    ]


def test_int8_weights_are_for_the_cpu():
    with pytest.raises(ConfigError, match=r"quantization 'int8' needs .*: this is meta"):
        select_kernels(torch.device("meta"), torch.bfloat16, quantization="int8")


@pytest.mark.parametrize(
    ("module", "function", "missing"),
    [
        (torch.backends.mkldnn, "is_available", "this torch has no oneDNN"),
        (torch.cpu, "_is_vnni_supported", "this CPU has no VNNI"),
    ],
)
def test_the_refusal_of_int8_weights_names_what_is_missing(monkeypatch, module, function, missing):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(module, function, lambda: False)
    with pytest.raises(ConfigError, match=f"quantization 'int8' needs .*: {missing}"):
        select_kernels(CPU, torch.bfloat16, quantization="int8")


@pytest.mark.parametrize("head_dim", [258, 15])
def test_heads_that_native_attention_does_not_take_get_the_reference(head_dim):
    assert isinstance(select_kernels(CPU, torch.float32, head_dim=head_dim).attention, TorchAttention)
    with pytest.raises(ConfigError, match="kv_cache_dtype 'int8' needs"):
        select_kernels(CPU, torch.float32, head_dim=head_dim, kv_cache_dtype="int8")


@needs_native
def test_int8_kv_is_refused_by_the_head_dim_that_it_cannot_have():
    assert isinstance(select_kernels(CPU, torch.float32, head_dim=256).attention, NativeAttention)
    with pytest.raises(ConfigError, match=r"even head_dim of at most 256; .* head_dim 258"):
        select_kernels(CPU, torch.float32, head_dim=258, kv_cache_dtype="int8")


def test_the_engine_chooses_by_the_head_dim_before_it_loads_weights(tmp_path):
    """Of this folder there is a config.json alone, which has no weights to be loaded."""
    config = LlamaConfig(head_dim=288, hidden_size=64, num_attention_heads=2, vocab_size=16)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="head_dim 288"):
        Engine(EngineConfig(str(tmp_path), dtype="float32", kv_cache_dtype="int8"))
    with pytest.raises(ConfigError, match=r"model\.safetensors does not exist"):
        Engine(EngineConfig(str(tmp_path), dtype="float32"))
