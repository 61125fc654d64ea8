"""Which kernels a model gets."""

import logging
import re
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig

from ingine.engine.config import EngineConfig
from ingine.engine.engine import Engine
from ingine.engine.kernels import native
from ingine.engine.kernels.attention import NativeAttention, TorchAttention
from ingine.engine.kernels.layers.int4_weights import Int4Weights
from ingine.engine.kernels.layers.weights import PlainWeights
from ingine.engine.kernels.native.weights import NativeInt8, NativeWeights
from ingine.engine.kernels.sampling import cuda as device_sampling
from ingine.engine.kernels.sampling.cuda import TRITON_SAMPLING
from ingine.engine.kernels.select import REFERENCE, select_kernels, triton_kernels
from ingine.engine.sample.sampler import sample
from ingine.errors import ConfigError
from tests.engine.marks import needs_native, needs_triton
from tests.engine.sampling_cases import make_sequence

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_the_choice_of_kernels_is_logged_in_one_line(caplog):
    with caplog.at_level(logging.INFO, logger="ingine.engine.kernels.select"):
        kernels = select_kernels(CPU, torch.float32)
    assert [record.message for record in caplog.records] == [
        f"kernels on cpu, float32: attention {kernels.attention.name}, layer operations {kernels.ops.name}, "
        f"weights {kernels.weights.name}, sampling {kernels.sampling.name}"
    ]


def test_int8_weights_are_for_the_cpu():
    with pytest.raises(ConfigError, match=r"quantization 'int8' needs .*: this is meta"):
        select_kernels(torch.device("meta"), torch.bfloat16, quantization="int8")


def test_int4_weights_are_for_the_native_kernels(monkeypatch):
    says = r"quantization 'int4' needs device cpu, .* native kernels .*; this is"
    with pytest.raises(ConfigError, match=f"{says} meta, torch.bfloat16"):
        select_kernels(torch.device("meta"), torch.bfloat16, quantization="int4")
    with pytest.raises(ConfigError, match=f"{says} cpu, torch.float16"):
        select_kernels(CPU, torch.float16, quantization="int4")
    monkeypatch.setattr(native, "library", lambda: None)
    with pytest.raises(ConfigError, match=f"{says} cpu, torch.bfloat16"):
        select_kernels(CPU, torch.bfloat16, quantization="int4")


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_native_kernels_multiply_int4_and_the_log_says_so(dtype, caplog):
    with caplog.at_level(logging.INFO, logger="ingine.engine.kernels.select"):
        weights = select_kernels(CPU, dtype, quantization="int4").weights
    assert isinstance(weights, Int4Weights)
    assert re.search(r"weights int4 \(native-int8 \([a-z0-9-]+\)\), sampling", caplog.text)


LACKS_INT8 = pytest.mark.parametrize(
    ("module", "function", "missing"),
    [
        (torch.backends.mkldnn, "is_available", "this torch has no oneDNN"),
        (torch.cpu, "_is_vnni_supported", "this CPU has no VNNI"),
    ],
)


@LACKS_INT8
def test_the_refusal_of_int8_weights_names_what_is_missing(monkeypatch, module, function, missing):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(module, function, lambda: False)
    with pytest.raises(ConfigError, match=f"quantization 'int8' needs .*: {missing}"):
        select_kernels(CPU, torch.float16, quantization="int8")
    monkeypatch.setattr(native, "library", lambda: None)
    with pytest.raises(ConfigError, match=f"quantization 'int8' needs .*: {missing}"):
        select_kernels(CPU, torch.bfloat16, quantization="int8")


@needs_native
@LACKS_INT8
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_native_kernels_multiply_int8_whatever_else_is_missing(monkeypatch, module, function, missing, dtype):
    monkeypatch.setattr(module, function, lambda: False)
    assert isinstance(select_kernels(CPU, dtype, quantization="int8").weights, NativeInt8)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_cpu_weights_are_the_native_ones_and_the_log_says_what_multiplies_them(dtype, caplog):
    with caplog.at_level(logging.INFO, logger="ingine.engine.kernels.select"):
        weights = select_kernels(CPU, dtype).weights
    assert isinstance(weights, NativeWeights)
    assert re.search(r"weights native-(f32|bf16) \([a-z0-9-]+\), sampling", caplog.text)


def test_float16_and_a_machine_without_a_compiler_have_plain_weights(monkeypatch):
    assert isinstance(select_kernels(CPU, torch.float16).weights, PlainWeights)
    monkeypatch.setattr(native, "library", lambda: None)
    assert isinstance(select_kernels(CPU, torch.float32).weights, PlainWeights)


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
    """The folder has only a config.json, and no weights to load."""
    config = LlamaConfig(head_dim=288, hidden_size=64, num_attention_heads=2, vocab_size=16)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="head_dim 288"):
        Engine(EngineConfig(str(tmp_path), dtype="float32", kv_cache_dtype="int8"))
    with pytest.raises(ConfigError, match=r"model\.safetensors does not exist"):
        Engine(EngineConfig(str(tmp_path), dtype="float32"))


def test_fp8_kv_is_for_cuda():
    with pytest.raises(ConfigError, match="kv_cache_dtype 'fp8' needs a device cuda, this is cpu"):
        select_kernels(CPU, torch.bfloat16, kv_cache_dtype="fp8")


def test_without_a_gpu_triton_is_not_imported():
    script = (
        "import sys, torch\n"
        "from ingine.engine.kernels.select import select_kernels\n"
        "select_kernels(torch.device('cpu'), torch.float32)\n"
        "assert 'triton' not in sys.modules and 'ingine.engine.kernels.triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


# -------------------------------------------------------------------- CUDA; only its capability is made up


@pytest.fixture
def capability(monkeypatch, tmp_path):
    """Sets the compute capability of the GPU, at first an H100's. There is a program that passes for a C
    compiler, and Python's headers."""
    monkeypatch.setenv("CC", sys.executable)
    monkeypatch.setattr("sysconfig.get_paths", lambda scheme: {"include": str(tmp_path)})
    (tmp_path / "Python.h").touch()

    def set_capability(major: int, minor: int) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, minor))

    set_capability(9, 0)
    return set_capability


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_cuda_there_are_triton_kernels(capability, dtype, caplog):
    with caplog.at_level(logging.INFO, logger="ingine.engine.kernels.select"):
        kernels = select_kernels(CUDA, dtype, head_dim=128, block_size=16)
    assert [type(part) for part in (kernels.attention, kernels.ops, kernels.weights)] == [
        type(part) for part in (triton_kernels().attention, triton_kernels().ops, triton_kernels().weights)
    ]
    assert kernels.sampling is TRITON_SAMPLING
    name = str(dtype).removeprefix("torch.")
    assert caplog.messages == [
        f"kernels on cuda, {name}: attention triton, layer operations triton, "
        "weights plain (triton where quantised), sampling triton"
    ]


@needs_triton
@pytest.mark.parametrize(
    ("dtype", "block_size", "kv_cache_dtype", "name"),
    [
        (torch.bfloat16, 256, "auto", "torch varlen"),
        (torch.bfloat16, 128, "auto", "triton"),
        (torch.float32, 256, "auto", "triton"),
        (torch.bfloat16, 256, "int8", "triton, int8 KV"),
    ],
)
def test_torchs_own_paged_attention_is_chosen_by_its_block_size(
    capability, monkeypatch, dtype, block_size, kv_cache_dtype, name
):
    monkeypatch.setattr("ingine.engine.kernels.attention.varlen.find_varlen_attn", lambda: lambda: None)
    kernels = select_kernels(CUDA, dtype, head_dim=128, kv_cache_dtype=kv_cache_dtype, block_size=block_size)
    assert kernels.attention.name == name


@needs_triton
def test_a_torch_without_paged_attention_has_tritons_at_any_block_size(capability, monkeypatch):
    monkeypatch.setattr("ingine.engine.kernels.attention.varlen.find_varlen_attn", lambda: None)
    kernels = select_kernels(CUDA, torch.bfloat16, head_dim=128, block_size=256)
    assert kernels.attention.name == "triton"


@needs_triton
def test_fp8_kv_needs_a_gpu_that_computes_in_it(capability):
    assert select_kernels(CUDA, torch.bfloat16, kv_cache_dtype="fp8").attention.name == "triton, fp8 KV"
    capability(8, 6)
    with pytest.raises(ConfigError, match=r"'fp8' needs compute capability 8\.9 or above, this is 8\.6"):
        select_kernels(CUDA, torch.bfloat16, kv_cache_dtype="fp8")
    assert select_kernels(CUDA, torch.bfloat16, kv_cache_dtype="int8").attention.name == "triton, int8 KV"


def no_triton(monkeypatch, capability, include):
    monkeypatch.setattr("ingine.engine.kernels.select.find_spec", lambda name: None)


def no_compiler(monkeypatch, capability, include):
    monkeypatch.delenv("CC")
    monkeypatch.setattr("shutil.which", lambda name: None)


def compiler_that_does_not_exist(monkeypatch, capability, include):
    monkeypatch.setenv("CC", "/nowhere/cc")


def no_headers(monkeypatch, capability, include):
    (include / "Python.h").unlink()


def old_gpu(monkeypatch, capability, include):
    capability(7, 5)


@needs_triton
@pytest.mark.parametrize(
    ("lack", "reason"),
    [
        (no_triton, "triton is not installed"),
        (no_compiler, r"triton finds no C compiler \(CC, gcc or clang\)"),
        (compiler_that_does_not_exist, "triton finds no C compiler, .*: CC is '/nowhere/cc'"),
        (no_headers, "what launches kernels is C code that includes Python.h, which is not in /"),
        (old_gpu, "compute capability 7.5 is under 8.0"),
    ],
)
def test_without_triton_the_reference_serves_and_the_log_says_why(
    capability, monkeypatch, tmp_path, caplog, lack, reason
):
    """This includes sampling: without Triton no kernel may be launched when a token is chosen."""
    lack(monkeypatch, capability, tmp_path)
    with caplog.at_level(logging.INFO, logger="ingine.engine.kernels.select"):
        kernels = select_kernels(CUDA, torch.bfloat16)
    assert kernels is REFERENCE
    (message,) = caplog.messages
    assert re.search(f"sampling torch, since there are no Triton kernels: {reason}", message)
    monkeypatch.setattr(device_sampling, "choose", None)
    seqs = [make_sequence(), make_sequence(temperature=1.0, top_k=1), make_sequence(logprobs=1)]
    logits = torch.tensor([[0.0, 1.0], [2.0, 0.0], [0.0, 3.0]])
    sampled = sample(logits, seqs, kernels.sampling).wait()
    assert [token.token_id for token in sampled] == [1, 0, 1]
    with pytest.raises(ConfigError, match=f"kv_cache_dtype 'int8' needs Triton kernels on CUDA: {reason}"):
        select_kernels(CUDA, torch.bfloat16, kv_cache_dtype="int8")


@needs_triton
def test_heads_that_triton_attention_does_not_take_get_the_reference(capability):
    assert select_kernels(CUDA, torch.bfloat16, head_dim=256) is not REFERENCE
    assert select_kernels(CUDA, torch.bfloat16, head_dim=288) is REFERENCE
