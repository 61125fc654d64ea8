"""Matrices that the tools of others have packed are the numbers that these tools make of them again."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from ingine.engine.files.safetensors_header import StoredTensor
from ingine.engine.kernels.layers.stored import Int4Matrix, ReorderedMatrix, ScaledMatrix, StoredMatrix
from ingine.engine.kernels.layers.weights import PlainWeights
from ingine.engine.models.quantization import Quantization, read_quantization
from ingine.engine.models.quantized_modules import find_quantized_modules
from ingine.errors import ConfigError, UnsupportedModel
from tests.engine.foreign import FILE, MATRICES, SHAPE, pack_int4

_DTYPES = {
    torch.int32: "I32", torch.int64: "I64", torch.int8: "I8", torch.float8_e4m3fn: "F8_E4M3",
    torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32",
}  # fmt: skip


def tensors_of(name: str) -> dict[str, torch.Tensor]:
    prefix = f"{name}."
    found = {key.removeprefix(prefix): one for key, one in load_file(FILE).items() if key.startswith(prefix)}
    assert found
    return found


def read(config: dict, tensors: dict[str, torch.Tensor], shape: tuple[int, int] = SHAPE) -> StoredMatrix:
    quantization = read_quantization({"quantization_config": config})
    assert isinstance(quantization, Quantization)
    headers = {
        f"m.{part}": StoredTensor(_DTYPES[t.dtype], tuple(t.shape), 0, 0) for part, t in tensors.items()
    }
    [module] = find_quantized_modules(quantization, headers, {"m.weight": list(shape)}).values()
    assert module.names() == headers.keys()
    return module.read(lambda name: tensors[name.removeprefix("m.")])


def packed(name: str) -> tuple[dict, dict[str, torch.Tensor], torch.Tensor]:
    tensors = tensors_of(name)
    dense = tensors.pop("dense")
    return MATRICES[name], tensors, dense


@pytest.mark.parametrize("name", MATRICES)
def test_a_matrix_is_what_the_tool_that_packed_it_unpacks(name):
    config, tensors, dense = packed(name)
    matrix = read(config, tensors)
    assert matrix.shape == SHAPE
    assert torch.equal(matrix.dense(), dense)


KINDS = {
    "awq": Int4Matrix, "gptq": Int4Matrix, "gptq-desc_act": ReorderedMatrix, "w4a16-channel": Int4Matrix,
    "w8a16": ScaledMatrix, "w8a8": ScaledMatrix, "fp8-block": ScaledMatrix,
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_a_matrix_stays_as_small_as_it_was(name):
    config, tensors, _ = packed(name)
    assert type(read(config, tensors)) is KINDS[name]
    assert read(config, tensors).name.startswith(("int4-g", "int8", "fp8"))


def test_only_a_checkpoint_made_for_it_has_activations_in_int8():
    for name in ("w8a8", "w8a16"):
        config, tensors, _ = packed(name)
        assert read(config, tensors).int8_activations == (name == "w8a8")


@pytest.mark.parametrize("name", MATRICES)
def test_a_dense_matrix_is_made_by_rows(name, monkeypatch):
    """Each is rounded, so that a vocabulary's matrix is never in float32 as a whole."""
    config, tensors, dense = packed(name)
    matrix = read(config, tensors)
    assert torch.equal(matrix.dense(slice(5, 23)), dense[5:23])
    make, made = type(matrix).dense, []

    def noted(self, rows=slice(None)):
        made.append(rows)
        return make(self, rows)

    monkeypatch.setattr("ingine.engine.kernels.layers.stored.ROWS_A_PART", 12)
    monkeypatch.setattr(type(matrix), "dense", noted)
    assert torch.equal(
        PlainWeights().embed_stored(matrix, torch.bfloat16)(torch.arange(32)), dense.bfloat16()
    )
    assert made[-3:] == [slice(0, 12), slice(12, 24), slice(24, 36)]
    assert max(rows.stop - rows.start for rows in made) == 12


@pytest.mark.parametrize("name", MATRICES)
def test_a_part_is_that_part_of_the_whole(name):
    config, tensors, dense = packed(name)
    matrix = read(config, tensors)
    assert torch.equal(matrix.part(0, slice(16, 32)).dense(), dense[16:32])
    if name == "gptq-desc_act":
        with pytest.raises(ValueError, match="desc_act"):
            matrix.part(1, slice(0, 32))
        return
    assert torch.equal(matrix.part(1, slice(32, 64)).dense(), dense[:, 32:])
    if matrix.scales.shape[1] > 1:
        with pytest.raises(ValueError, match=r"0 to 24 divides .* of 32"):
            matrix.part(1, slice(0, 24))
    else:
        assert torch.equal(matrix.part(1, slice(0, 24)).dense(), dense[:, :24])
        assert torch.equal(matrix.part(1, slice(24, 64)).dense(), dense[:, 24:])


def test_a_zero_of_the_first_gptq_format_carries_as_its_tools_add_it():
    """A zero of 0 was stored by subtracting one from the word, and comes back by adding it."""
    config, tensors, _ = packed("gptq_v2")
    zeros = tensors["qzeros"].clone()
    zeros[0, 0] &= ~0xF  # the first zero of eight is 0, so subtracting one borrows from the next
    second = read(config, tensors | {"qzeros": zeros})
    first = read(MATRICES["gptq"], tensors | {"qzeros": zeros - 0x11111111})
    assert second.zeros[0, 0] == 0
    assert torch.equal(first.zeros, second.zeros)


@pytest.mark.parametrize("name", ["w4a16", "w8a16"])
def test_columns_are_in_order_where_compressed_tensors_has_set_no_other(name):
    """It writes no `weight_g_idx` that is still -1, and reads one, or none, as columns in order."""
    config, tensors, dense = packed(name)
    [group] = config["config_groups"].values()
    group = {**group, "weights": group["weights"] | {"actorder": "group"}}
    config = config | {"config_groups": {"group_0": group}}
    unset = torch.full((SHAPE[1],), -1, dtype=torch.int32)
    assert torch.equal(read(config, tensors).dense(), dense)
    assert torch.equal(read(config, tensors | {"weight_g_idx": unset}).dense(), dense)
    unset[3] = 0
    with pytest.raises(ConfigError, match=r"m: .*g_idx"):
        read(config, tensors | {"weight_g_idx": unset})


@pytest.mark.parametrize("name", ["awq", "gptq", "w4a16", "w8a16"])
def test_a_plain_weight_beside_the_quantised_one_is_refused(name):
    config, tensors, dense = packed(name)
    with pytest.raises(ConfigError, match=r"m\.weight is there, and the same module's quantised tensors too"):
        read(config, tensors | {"weight": dense})


# ----------------------------------------------------------------------------------------- what is refused


def damaged(name: str, part: str, change) -> None:
    config, tensors, _ = packed(name)
    if part not in tensors:
        pytest.fail(part)
    changed = change(tensors[part])
    read(config, {key: one for key, one in (tensors | {part: changed}).items() if one is not None})


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("awq", "qzeros"), ("awq", "scales"), ("gptq", "qzeros"), ("gptq", "scales"),
        ("w4a16", "weight_scale"), ("w4a16", "weight_shape"), ("w4a16-asym", "weight_zero_point"),
        ("w8a8", "weight_scale"), ("fp8-block", "weight_scale"), ("gptq-desc_act", "g_idx"),
    ],
)  # fmt: skip
def test_a_tensor_that_is_missing_is_named(name, part):
    with pytest.raises(ConfigError, match=rf"missing: m\.{part}"):
        damaged(name, part, lambda tensor: None)


@pytest.mark.parametrize("name", MATRICES)
def test_a_tensor_of_another_shape_or_type_is_named(name):
    _, tensors, _ = packed(name)
    for part, tensor in tensors.items():
        with pytest.raises(ConfigError, match=rf"m\.{part} (is|in)"):
            damaged(name, part, lambda tensor: torch.cat((tensor.reshape(-1), tensor.reshape(-1)[:1])))
        other = torch.int64 if tensor.dtype != torch.int64 else torch.int8
        if part != "weight":  # then it is no quantised weight at all
            with pytest.raises(UnsupportedModel, match=rf"m\.{part} in I"):
                damaged(name, part, lambda tensor, other=other: tensor.to(other))


@pytest.mark.parametrize(
    ("name", "part", "change", "says"),
    [
        ("w4a16", "weight_shape", lambda shape: shape.flip(0), r"weight_shape is \[64, 32\], not \[32, 64\]"),
        ("w8a16", "weight_shape", lambda shape: shape * 2**40, "weight_shape"),
        ("gptq-desc_act", "g_idx", lambda groups: groups * 0, "g_idx does not have 2 groups of 32"),
        ("gptq-desc_act", "g_idx", lambda groups: groups - 2**31, "g_idx does not have 2 groups of 32"),
        ("gptq", "scales", lambda scales: scales.float() * 1e9, "do not fit into float16"),
        ("gptq", "scales", lambda scales: scales * torch.nan, "do not fit into float16"),
        ("fp8", "weight_scale", lambda scales: scales * torch.inf, "a scale is not finite"),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_is_named_with_its_module(name, part, change, says):
    with pytest.raises(ConfigError, match=f"m: .*{says}"):
        damaged(name, part, change)


def test_scales_of_other_groups_than_config_json_names_are_refused():
    config, tensors, _ = packed("gptq")
    with pytest.raises(ConfigError, match=r"m\.scales is \[2, 32\]: config\.json has no int4 scheme"):
        read(config | {"group_size": 16}, tensors)


def test_two_schemes_that_fit_are_not_guessed_between():
    config, tensors, _ = packed("fp8-block")
    [group] = config["config_groups"].values()
    other = {**group, "weights": group["weights"] | {"block_structure": [16, 40]}}
    with pytest.raises(UnsupportedModel, match=r"several schemes of config\.json fit m\.weight_scale"):
        read(config | {"config_groups": {"a": group, "b": other}}, tensors)


def test_a_bias_that_such_a_model_has_not_must_be_zero():
    config, tensors, dense = packed("gptq")
    assert torch.equal(read(config, tensors | {"bias": torch.zeros(32)}).dense(), dense)
    with pytest.raises(ConfigError, match="m: its bias is not zero"):
        read(config, tensors | {"bias": torch.ones(32)})


def test_scales_of_activations_are_not_needed():
    config, tensors, dense = packed("fp8")
    assert torch.equal(read(config, tensors | {"input_scale": torch.ones(1)}).dense(), dense)


@pytest.mark.parametrize("name", [name for name in MATRICES if "8" not in name])
def test_what_packs_int4_in_other_tests_packs_as_the_tools_do(name):
    config, tensors, _ = packed(name)
    matrix, order = read(config, tensors), None
    if isinstance(matrix, ReorderedMatrix):
        matrix, order = matrix.matrix, matrix.column_order
    codes = torch.stack((matrix.codes & 15, matrix.codes >> 4), dim=2).flatten(1)
    ours = pack_int4(name, codes, matrix.scales, matrix.zeros, order)
    assert ours.keys() == tensors.keys()
    for part, tensor in tensors.items():
        assert torch.equal(ours[part], tensor) and ours[part].dtype == tensor.dtype


def test_a_fixture_has_numbers_that_differ():
    """Otherwise a wrong order of columns or rows could go unnoticed."""
    for name in MATRICES:
        _, _, dense = packed(name)
        assert len(dense.unique(dim=0)) == 32 and len(dense.unique(dim=1).T) == 64


def test_deepseek_s_name_of_a_scale():
    _, tensors, dense = packed("fp8-block")
    tensors["weight_scale_inv"] = tensors.pop("weight_scale").float()
    fp8 = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [16, 32],
    }
    assert torch.equal(read(fp8, tensors).dense(), dense)


def test_blocks_at_the_edges_may_be_smaller():
    matrix = ScaledMatrix(
        (5, 6), torch.ones(5, 6, dtype=torch.int8), torch.tensor([[1.0, 2.0], [3.0, 4.0]]), (3, 4)
    )
    expected = torch.tensor([1.0, 1, 1, 1, 2, 2]).expand(5, 6).clone()
    expected[3:] += 2
    assert torch.equal(matrix.dense(), expected)
    assert torch.equal(matrix.part(1, slice(4, 6)).dense(), expected[:, 4:])
    assert replace(matrix).name == "int8"
