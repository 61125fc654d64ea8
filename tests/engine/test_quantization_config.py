"""`quantization_config` of config.json: read as the tools that write it mean it, or refused by name."""

import json
from typing import Any

import pytest

from ingine.engine.models.quantization import Quantization, Scheme, read_quantization
from ingine.errors import ConfigError, UnsupportedModel
from tests.engine.foreign import MATRICES

_FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True, "observer": "minmax", "observer_kwargs": {}}
_NULLS = dict.fromkeys(("actorder", "block_structure", "group_size"))
_GPTQMODEL = {
    "activation": None, "bits": 4, "dynamic": None, "lm_head": False, "pack_dtype": "int32", "rotation": None,
    "meta": {"quantizer": ["gptqmodel:7.7.0"], "damp_percent": 0.05},
}  # fmt: skip

PUBLISHED: dict[str, tuple[dict[str, Any], Quantization]] = {
    "Qwen2.5-7B-Instruct-AWQ": (
        {
            "quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True,
            "modules_to_not_convert": None,
        },
        Quantization("awq", (Scheme("int4", 1, 128),)),
    ),
    "Qwen2.5-7B-Instruct-GPTQ-Int4": (
        {
            "batch_size": 1, "bits": 4, "block_name_to_quantize": None, "cache_block_outputs": True,
            "damp_percent": 0.01, "dataset": None, "desc_act": False, "exllama_config": {"version": 1},
            "group_size": 128, "max_input_length": None, "model_seqlen": None,
            "module_name_preceding_first_block": None, "modules_in_block_to_quantize": None,
            "pad_token_id": None, "quant_method": "gptq", "sym": True, "tokenizer": None,
            "true_sequential": True, "use_cuda_fp16": False, "use_exllama": True,
        },
        Quantization("gptq", (Scheme("int4", 1, 128),), zeros_less_one=True),
    ),
    "GPTQ by GPTQModel": (
        _GPTQMODEL | {
            "checkpoint_format": "gptq_v2", "desc_act": True, "format": "gptq_v2", "group_size": -1,
            "method": "gptq", "quant_method": "gptq", "sym": True,
        },
        Quantization("gptq", (Scheme("int4", 1, None),), desc_act=True),
    ),
    "AWQ by GPTQModel": (
        _GPTQMODEL | {
            "checkpoint_format": "gemm", "desc_act": False, "format": "gemm", "group_size": 128,
            "method": "awq", "quant_method": "awq", "version": "gemm", "zero_point": True,
        },
        Quantization("awq", (Scheme("int4", 1, 128),)),
    ),
    "Llama-3.1-8B-Instruct-FP8-dynamic": (
        {
            "config_groups": {
                "group_0": {
                    "input_activations": {
                        **_FLOAT8, **_NULLS, "dynamic": True, "strategy": "token", "observer": None,
                    },
                    "output_activations": None,
                    "targets": ["Linear"],
                    "weights": {**_FLOAT8, **_NULLS, "dynamic": False, "strategy": "channel"},
                }
            },
            "format": "float-quantized", "global_compression_ratio": 1.2, "ignore": ["lm_head"],
            "kv_cache_scheme": None, "quant_method": "compressed-tensors",
            "quantization_status": "compressed", "sparsity_config": {}, "version": "0.11.0",
        },
        Quantization("compressed-tensors", (Scheme("fp8", 1, None),)),
    ),
    "Qwen3-8B-FP8": (
        {
            "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
            "weight_block_size": [128, 128],
            "modules_to_not_convert": ["lm_head", "model.layers.0.input_layernorm"],
        },
        Quantization("fp8", (Scheme("fp8", 128, 128),)),
    ),
    "by AutoFP8": (
        {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]},
        Quantization("fp8", (Scheme("fp8", None, None), Scheme("fp8", 1, None))),
    ),
}  # fmt: skip


def read(config: Any) -> Quantization | None:
    return read_quantization({"quantization_config": config})


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_published_is_read(name):
    config, expected = PUBLISHED[name]
    assert read(json.loads(json.dumps(config))) == expected


@pytest.mark.parametrize("config", [None, {}])
def test_weights_may_be_plain(config):
    assert read(config) is None


def test_several_groups_are_several_schemes():
    [int8], [int4] = (MATRICES[name]["config_groups"].values() for name in ("w8a8", "w4a16"))
    groups = {"a": int8 | {"format": "int-quantized"}, "b": int4 | {"format": "pack-quantized"}}
    config = {"quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": groups}
    assert read(config).schemes == (Scheme("int8", 1, None, int8_activations=True), Scheme("int4", 1, 32))


def weights(**changes: Any) -> dict[str, Any]:
    config = MATRICES["w4a16"]
    group = config["config_groups"]["group_0"]
    return {"config_groups": {"group_0": group | {"weights": group["weights"] | changes}}}


def group(**changes: Any) -> dict[str, Any]:
    return {"config_groups": {"group_0": MATRICES["w4a16"]["config_groups"]["group_0"] | changes}}


UNSUPPORTED = [
    ("awq", {"quant_method": "bitsandbytes"}, "bitsandbytes.*original weights or a GGUF"),
    ("awq", {"quant_method": ["awq"]}, r"quant_method \['awq'\]"),
    ("awq", {"bits": 3}, r"AWQ with bits = 3 .*4 works"),
    ("awq", {"bits": True}, "AWQ with bits = True"),
    ("awq", {"version": "gemv"}, "AWQ with version 'gemv'.*'gemm'"),
    ("awq", {"version": ["gemm"]}, "AWQ with version"),
    ("awq", {"backend": "llm-awq"}, "AWQ with version"),
    ("awq", {"zero_point": False}, "AWQ with zero_point = False"),
    ("gptq", {"bits": 8}, "GPTQ with bits = 8"),
    ("gptq", {"checkpoint_format": "marlin"}, "GPTQ with checkpoint_format 'marlin'"),
    ("gptq", {"is_marlin_format": True}, "is_marlin_format"),
    ("gptq", {"dynamic": {"-:.*": {}}}, "GPTQ with dynamic"),
    ("gptq", {"adapter": {"name": "lora"}}, "GPTQ with adapter"),
    ("gptq", {"rotation": "hadamard"}, "GPTQ with rotation"),
    ("awq", {"activation": {"mode": "w4afp8"}}, "AWQ with activation"),
    ("awq", {"checkpoint_format": "gemv_fast"}, "AWQ with version 'gemv_fast'"),
    ("gptq", {"pack_dtype": "int16"}, "pack_dtype"),
    ("gptq", {"planar": True}, "'planar', which nothing here knows"),
    ("w4a16", {"format": "nvfp4-pack-quantized"}, "nvfp4-pack-quantized"),
    ("w4a16", {"format": "marlin-24"}, "marlin-24"),
    ("w4a16", {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
    ("w4a16", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
    ("w4a16", {"transform_config": {"config_groups": {}}}, "transform_config"),
    ("w4a16", {"config_groups": {"W4A16": ["Linear"]}}, "a scheme that is a name"),
    ("w4a16", weights(num_bits=3), "type 'int', 3 bits"),
    ("w4a16", weights(type="float"), "type 'float', 4 bits"),
    ("w4a16", weights(strategy="tensor_group"), "strategy 'tensor_group'"),
    ("w4a16", weights(dynamic=True), "dynamic = True"),
    ("w4a16", weights(unheard=1), "'unheard', which nothing here knows"),
    ("w4a16", group(output_activations={"num_bits": 8}), "output_activations"),
    ("fp8", {"quant_method": "fbgemm_fp8"}, "fbgemm_fp8"),
]


@pytest.mark.parametrize(("name", "changes", "says"), UNSUPPORTED, ids=lambda value: str(value)[:40])
def test_what_is_not_supported_is_refused_by_name(name, changes, says):
    with pytest.raises(UnsupportedModel, match=says) as error:
        read(MATRICES[name] | changes)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("size", [0, -2, 1 << 30, 10**30, "128", 1.5, True, None, [], {}], ids=repr)
def test_sizes_of_groups_that_cannot_be_are_named(size):
    for name in ("awq", "gptq"):
        with pytest.raises(ConfigError, match="group_size"):
            read(MATRICES[name] | {"group_size": size})
    with pytest.raises(ConfigError, match="group_size"):
        read(MATRICES["w4a16"] | weights(group_size=size))
    for block in (size, [size, 128], [128, size, 128], "128x", "1" * 100_000):
        if block is not None:
            with pytest.raises(ConfigError, match="block"):
                read({"quant_method": "fp8", "weight_block_size": block})


@pytest.mark.parametrize("wrong", [[], "awq", 7, {"config_groups": 7}, {"config_groups": {}}], ids=repr)
def test_what_is_no_config_is_named(wrong):
    if isinstance(wrong, dict):
        wrong = {"quant_method": "compressed-tensors"} | wrong
    elif not wrong:
        wrong = [1]
    with pytest.raises(ConfigError, match="quantization_config"):
        read(wrong)


@pytest.mark.parametrize("value", [[], {}, ["int"], "x" * 10_000, 10**30, None, float("nan")], ids=repr)
def test_no_value_of_a_group_is_a_traceback(value):
    for key in ("num_bits", "type", "symmetric", "strategy", "dynamic", "actorder"):
        try:
            assert isinstance(read(MATRICES["w4a16"] | weights(**{key: value})), Quantization)
        except ConfigError as error:
            assert len(str(error)) < 500
    for key in ("weights", "input_activations", "format", "targets"):
        try:
            assert isinstance(read(MATRICES["w4a16"] | group(**{key: value})), Quantization)
        except ConfigError as error:
            assert len(str(error)) < 500


def test_patterns_of_a_file_are_never_run():
    """This pattern as a regular expression would take for ever on most names."""
    patterns = ["re:(a+)+$" + "a" * 10_000] * 10_000
    for name, key in (("awq", "modules_to_not_convert"), ("w4a16", "ignore")):
        assert read(MATRICES[name] | {key: patterns}) == read(MATRICES[name])
    assert read(MATRICES["w4a16"] | group(targets=patterns)) == read(MATRICES["w4a16"])
