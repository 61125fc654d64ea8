"""Engine settings: what is refused, and what the engine chooses where it may."""

import subprocess
import sys

import pytest
import torch

from ingine.engine.config import EngineConfig, numerics
from ingine.engine.kernels import native
from ingine.engine.run.device import (
    available_host_bytes,
    num_kv_blocks,
    resolve_limits,
    select_device,
    select_dtype,
)
from ingine.errors import ConfigError
from tests.engine.driving import make_engine
from tests.engine.marks import needs_native

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"model": ""}, "model must be a non-empty string"),
        ({"dtype": "int8"}, "dtype must be one of auto, float32, bfloat16, float16"),
        ({"quantization": "int2"}, "quantization must be one of int8, int4, or None, not 'int2'"),
        ({"device": 0}, "device must be"),
        ({"kv_cache_bytes": "2XB"}, "kv_cache_bytes must be a number of bytes, such as .*, not '2XB'"),
        ({"kv_cache_bytes": "0GiB"}, "kv_cache_bytes must be an int of at least 1"),
        ({"max_model_len": 0}, "max_model_len must be an int of at least 1, not 0"),
        ({"max_num_seqs": 1.5}, "max_num_seqs must be an int"),
        ({"max_num_batched_tokens": True}, "max_num_batched_tokens must be an int"),
        ({"max_num_seqs": 8, "max_num_batched_tokens": 4}, r"\(4\) must not be under max_num_seqs \(8\)"),
        ({"block_size": 0}, "block_size must be"),
        ({"kv_cache_bytes": -1}, "kv_cache_bytes must be"),
        ({"gpu_memory_utilization": 0}, "gpu_memory_utilization must be a number over 0 and up to 1, not 0"),
        ({"gpu_memory_utilization": 1.1}, "gpu_memory_utilization must be"),
        ({"enable_prefix_caching": "no"}, "enable_prefix_caching must be a bool"),
        ({"priority_ageing_s": 0}, "priority_ageing_s must be"),
        ({"speculation": "eagle"}, "speculation must be one of ngram, suffix, or None, not 'eagle'"),
        ({"num_speculative_tokens": 0}, "num_speculative_tokens must be an int of at least 1"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_a_wrong_value_names_its_field(options, says):
    with pytest.raises(ConfigError, match=says):
        EngineConfig(**{"model": "m"} | options)


def test_what_only_keeps_books_imports_no_torch():
    names = ("config", "schedule.scheduler", "schedule.speculation", "outputs", "text.detokenizer")
    modules = ", ".join(f"ingine.engine.{name}" for name in names)
    script = f"import sys, {modules}; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", script], text=True).strip() == "False"


def test_limits_are_chosen_together(llama):
    def limits(**options) -> tuple[int, int, int]:
        config = resolve_limits(EngineConfig("m", **options), CPU, model_max_len=512)
        return config.max_num_seqs, config.max_num_batched_tokens, config.max_model_len

    assert limits() == (64, 512, 512)
    assert limits(max_num_seqs=1000) == (1000, 1000, 512)
    assert limits(max_num_batched_tokens=8) == (8, 8, 512)
    assert limits(max_model_len=100) == (64, 512, 100)

    on_a_gpu = resolve_limits(EngineConfig("m"), torch.device("cuda"), model_max_len=512)
    assert (on_a_gpu.max_num_seqs, on_a_gpu.max_num_batched_tokens) == (256, 2048)


def test_a_sequence_longer_than_the_model_was_made_for_is_refused(llama):
    with pytest.raises(
        ConfigError, match=r"max_model_len \(513\) is over what the model was made for \(512\)"
    ):
        make_engine(llama, max_model_len=513)


def resolved(**options) -> EngineConfig:
    return resolve_limits(EngineConfig("m", **options), CPU, model_max_len=512)


def test_kv_memory_is_what_is_given():
    """This holds even if all sequences cannot use so much at once: the rest is for prefixes."""
    assert num_kv_blocks(resolved(kv_cache_bytes=10_500), CPU, bytes_per_block=1000) == 10
    assert num_kv_blocks(resolved(kv_cache_bytes=10**6, max_num_seqs=2), CPU, bytes_per_block=1000) == 1000


def test_kv_memory_that_is_not_given_is_no_more_than_can_be_used():
    assert num_kv_blocks(resolved(max_num_seqs=2), CPU, bytes_per_block=1000) == 64


def test_kv_memory_of_the_host_is_a_share_of_what_is_available():
    available = 64 * 32 * 10**9  # each of all blocks would take a gigabyte
    assert 0 < num_kv_blocks(resolved(), CPU, bytes_per_block=10**6) * 10**6 < available


def test_a_container_s_cached_files_are_not_memory_in_use(tmp_path):
    def available(**files: str) -> int:
        for name, content in files.items():
            (tmp_path / name.replace("_", ".", 1)).write_text(content)
        return available_host_bytes(tmp_path)

    of_the_machine = available()
    assert of_the_machine > 10_000
    stat = "anon 2500\nfile 4000\ninactive_file 3000\nactive_file 900\n"
    assert available(memory_max="10000\n", memory_current="7000\n", memory_stat=stat) == 6900
    assert available(memory_current="20000\n") == 0
    assert available(memory_max="max\n") > 10_000


def test_too_little_kv_memory_is_refused():
    with pytest.raises(ConfigError, match="no room for KV: 999 bytes, where a block of 16 tokens takes 1000"):
        num_kv_blocks(resolved(kv_cache_bytes=999), CPU, bytes_per_block=1000)


def test_devices_and_dtypes():
    assert select_device("cpu") == CPU
    assert select_dtype("float16", CPU, torch.bfloat16) == torch.float16


@needs_native
def test_on_a_cpu_without_bfloat16_a_checkpoint_in_it_stays_in_it_where_native_kernels_expand_it(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True}, raising=False)
    assert select_dtype("auto", CPU, torch.bfloat16) == torch.bfloat16
    assert select_dtype("auto", CPU, torch.float32) == torch.float32
    assert select_dtype("auto", CPU, torch.float16) == torch.float32
    assert select_dtype("float32", CPU, torch.bfloat16) == torch.float32
    monkeypatch.setattr(native, "library", lambda: None)
    assert select_dtype("auto", CPU, torch.bfloat16) == torch.float32


def test_on_a_cpu_with_bfloat16_any_checkpoint_is_computed_in_it(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    for checkpoint_dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert select_dtype("auto", CPU, checkpoint_dtype) == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("gpu", "'gpu' is none of auto, cpu, cuda, cuda:1 and mps"),
        ("tpu!", "'tpu!' is none of"),
        ("cuda:-1", "'cuda:-1' is none of"),
        ("meta", "'meta' is none of"),  # torch knows it; nothing can be computed there
        ("cuda:99", "'cuda:99' cannot be used"),
    ],
)
def test_a_device_that_cannot_be_had_is_told_with_those_that_can(name, says):
    with pytest.raises(ConfigError, match=says) as caught:
        select_device(name)
    assert "this machine has cpu" in str(caught.value)
    assert "privateuseone" not in str(caught.value)  # torch's own list of everything


@pytest.mark.parametrize(
    ("given", "expected"), [(1 << 30, 1 << 30), ("2GB", 2 * 10**9), ("1.5 GiB", 3 << 29)]
)
def test_memory_for_kv_may_have_a_unit(given, expected):
    assert EngineConfig("m", kv_cache_bytes=given).kv_cache_bytes == expected


@pytest.mark.parametrize(
    ("options", "loaded", "expected"),
    [
        ({}, [], "bfloat16"),
        ({"quantization": "int8", "kv_cache_dtype": "int8"}, [], "bfloat16,int8,kv-int8"),
        ({"kv_cache_dtype": "int4"}, [], "bfloat16,kv-int4"),
        ({"quantization": "int4"}, ["by-importance"], "bfloat16,int4,by-importance"),
        ({"quantization": "int4", "tensor_parallel_size": 2}, [], "bfloat16,int4,ranks-2"),
        ({"tensor_parallel_size": 2}, [], "bfloat16"),
        ({"tensor_parallel_size": 2}, ["as-stored-14"], "bfloat16,as-stored-14,ranks-2"),
        ({"generation_config": "vllm"}, [], "bfloat16,generation-config-vllm"),
    ],
)
def test_numerics_name_all_that_decides_tokens(options, loaded, expected):
    assert numerics(EngineConfig("m", **options), torch.bfloat16, loaded) == expected


def test_the_engine_tells_what_it_chose(llama):
    config = make_engine(llama, max_num_seqs=None, max_num_batched_tokens=None, max_model_len=None).config
    assert (config.max_num_seqs, config.max_num_batched_tokens, config.max_model_len) == (64, 512, 512)
