"""Whole models whose weights others have quantised: the tokens are transformers' with the dense weights."""

import json
import logging
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from ingine.engine.communication.parallel import TensorParallel
from ingine.engine.config import EngineConfig
from ingine.engine.engine import Engine
from ingine.engine.kernels.layers.stored import Int4Matrix, StoredMatrix
from ingine.engine.kernels.layers.weights import PlainWeights
from ingine.engine.kernels.select import REFERENCE, select_kernels
from ingine.engine.models.importance import Probe
from ingine.engine.models.loader import load_model
from ingine.errors import ConfigError, UnsupportedModel
from tests.engine.foreign import CHECKPOINTS, pack, quantize_model
from tests.engine.marks import needs_interpreter, needs_native
from tests.engine.packed import CPU, PackedModel, PagedSequence
from tests.engine.test_checkpoints import edit_weights, greedy, hf_greedy
from tests.engine.test_layer_ops import round_to_nearest
from tests.engine.test_models import PROMPT, assert_same, hf_logits, load, load_unpacked
from tests.tiny_models import make_tiny_model

LAYER = "model.layers.0"


def make(tmp_path, name: str, arch: str = "llama", **values):
    path, dense = make_tiny_model(tmp_path / "model", arch, **values), tmp_path / "dense"
    quantize_model(path, name, dense)
    return path, dense


def leave_out(path, dense, module: str) -> None:
    """Give it the plain weight that it has in `dense`."""
    plain = load_file(dense / "model.safetensors")

    def edit(tensors):
        others = {key: one for key, one in tensors.items() if not key.startswith(f"{module}.")}
        own = {key: plain[key] for key in (f"{module}.weight", f"{module}.bias") if key in plain}
        return others | own

    edit_weights(path, edit)


def logits(model) -> torch.Tensor:
    return PackedModel(model).step((PagedSequence(PROMPT), len(PROMPT)))[0]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_logits_are_those_of_the_dense_weights(name, tmp_path):
    path, dense = make(tmp_path, name, "qwen2")
    assert_same(logits(load(path)), hf_logits(dense, PROMPT))


@pytest.mark.parametrize("name", ["awq", "gptq-desc_act", "w4a16-asym", "w8a8", "fp8-block", "deepseek"])
def test_tokens_are_those_of_the_dense_weights(name, tmp_path, monkeypatch):
    path, dense = make(tmp_path, name)
    monkeypatch.setattr("ingine.engine.build.select_kernels", lambda *args, **kwargs: REFERENCE)
    assert greedy(path) == hf_greedy(dense)


@pytest.mark.parametrize("name", ["gptq", "fp8"])
def test_weights_that_are_not_packed_are_dense(name, tmp_path):
    path, dense = make(tmp_path, name)
    tensors, expected = load_unpacked(path).checkpoint_tensors(), load_file(dense / "model.safetensors")
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in tensors.items())


class Recording(PlainWeights):
    """Notes what it is given, and keeps what is int4 in groups."""

    def __init__(self):
        self.parts: list[list[StoredMatrix]] = []

    def keeps(self, part, dtype):
        return part.name.startswith("int4")

    def pack_stored(self, parts, bias, dtype):
        self.parts.append(list(parts))
        return super().pack_stored(parts, bias, dtype)


def test_a_format_is_given_the_parts_of_each_product_and_the_log_says_which_are_kept(tmp_path, caplog):
    path, _ = make(tmp_path, "awq")
    weights = Recording()
    with caplog.at_level(logging.INFO, logger="ingine.engine.models.loader"):
        load_model(path, dtype=torch.float32, device=CPU, kernels=replace(REFERENCE, weights=weights))
    assert [[part.shape for part in parts] for parts in weights.parts[:4]] == [
        [(64, 64), (32, 64), (32, 64)],
        [(64, 64)],
        [(96, 64), (96, 64)],
        [(64, 96)],
    ]
    assert all(type(part) is Int4Matrix for parts in weights.parts for part in parts)
    assert caplog.messages == [f"{path}: quantised matrices: 14 int4-g32"]
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="ingine.engine.models.loader"):
        load(path)
    assert caplog.messages == [f"{path}: quantised matrices: 14 int4-g32 converted"]


# -------------------------------------------------------------------------------- kernels other than torch's


@needs_native
def test_int8_for_int8_activations_is_multiplied_as_such_on_a_cpu(tmp_path, caplog):
    path, dense = make(tmp_path, "w8a8")
    kernels = replace(REFERENCE, weights=select_kernels(CPU, torch.float32).weights)
    with caplog.at_level(logging.INFO, logger="ingine.engine.models.loader"):
        model = load_model(path, dtype=torch.float32, device=CPU, kernels=kernels)
    assert caplog.messages == [f"{path}: quantised matrices: 14 int8"]
    expected = logits(load(dense))
    assert 0 < (logits(model) - expected).norm() < 0.05 * expected.norm()


@needs_native
@pytest.mark.parametrize(("name", "kind"), [("awq", "int4-g32"), ("gptq-desc_act", "int4-g32, reordered")])
def test_int4_is_multiplied_as_it_is_stored_on_a_cpu_if_its_groups_lie_side_by_side(
    name, kind, tmp_path, caplog
):
    path, dense = make(tmp_path, name)
    kernels = replace(REFERENCE, weights=select_kernels(CPU, torch.float32).weights)
    with caplog.at_level(logging.INFO, logger="ingine.engine.models.loader"):
        model = load_model(path, dtype=torch.float32, device=CPU, kernels=kernels)
    dense_note = " converted" if "reordered" in kind else ""
    assert caplog.messages == [f"{path}: quantised matrices: 14 {kind}{dense_note}"]
    expected = logits(load(dense))
    assert (logits(model) - expected).norm() < 0.05 * expected.norm()


@needs_native
@pytest.mark.parametrize(("name", "says"), [("awq", "14 int4-g32"), ("fp8-channel", "14 fp8 converted")])
def test_a_model_that_is_to_be_int4_keeps_what_is_int4_and_converts_the_rest(name, says, tmp_path, caplog):
    path, dense = make(tmp_path, name)
    kernels = replace(REFERENCE, weights=select_kernels(CPU, torch.float32, quantization="int4").weights)
    with caplog.at_level(logging.INFO, logger="ingine.engine.models.loader"):
        model = load_model(path, dtype=torch.float32, device=CPU, kernels=kernels)
    assert caplog.messages == [f"{path}: quantised matrices: {says}"]
    from_dense = load_model(dense, dtype=torch.float32, device=CPU, kernels=kernels)
    assert torch.equal(logits(model), logits(from_dense)) == ("converted" in says)


@needs_native
@pytest.mark.parametrize(
    ("name", "quantization", "num_ranks", "expected"),
    [
        ("awq", None, 1, ["as-stored-14"]),
        ("w8a8", None, 1, ["as-stored-14"]),
        ("fp8", None, 1, []),
        ("gptq-desc_act", None, 1, []),
        ("w4a16", None, 2, ["as-stored-12"]),
        ("awq", "int4", 1, ["as-stored-14"]),
        ("fp8", "int4", 1, ["by-importance"]),
        ("fp8", "int4", 2, []),
    ],
)
def test_what_became_of_the_weights_is_named_where_it_may_change_tokens(
    name, quantization, num_ranks, expected, tmp_path
):
    """A worker with a compiler and one without must not count as the same."""
    path, _ = make(tmp_path, name)
    native = select_kernels(CPU, torch.float32, quantization=quantization)
    for rank in range(num_ranks):
        parallel = TensorParallel(rank, num_ranks, CPU)
        model = load_model(path, dtype=torch.float32, device=CPU, kernels=native, parallel=parallel)
        assert model.numerics() == expected
    assert load(path).numerics() == []


@needs_native
def test_an_engine_tells_what_became_of_its_weights(tmp_path):
    path, _ = make(tmp_path, "awq")
    assert Engine(EngineConfig(str(path), dtype="float32")).numerics == "float32,as-stored-14"


@needs_native
def test_nothing_is_measured_where_nothing_is_rounded(tmp_path, monkeypatch):
    """If a later layer is rounded, the layers before it run first."""
    path, dense = make(tmp_path, "awq")
    kernels = select_kernels(CPU, torch.float32, quantization="int4")
    run, layers = Probe.run, []

    def noted(self, layer, linears):
        layers.append((layer, len(list(linears))))
        return run(self, layer, linears)

    monkeypatch.setattr(Probe, "run", noted)
    load_model(path, dtype=torch.float32, device=CPU, kernels=kernels)
    assert layers == []
    leave_out(path, dense, "model.layers.1.mlp.down_proj")
    model = load_model(path, dtype=torch.float32, device=CPU, kernels=kernels)
    assert layers == [(model.layers[0], 0), (model.layers[1], 1)]


@needs_native
@pytest.mark.parametrize("part", ["q_proj", "v_proj"])
def test_parts_of_a_product_that_are_quantised_stay_so_beside_one_that_is_not(part, tmp_path, caplog):
    path, dense = make(tmp_path, "awq", "qwen2")  # which has biases
    weight = f"{LAYER}.self_attn.{part}.weight"
    shape = load_file(dense / "model.safetensors")[weight].shape
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))  # or it were on a grid of int4
    edit_weights(dense, lambda tensors: tensors | {weight: tensors[weight] + 0.02 * noise})
    leave_out(path, dense, f"{LAYER}.self_attn.{part}")
    exact = load(dense)
    for quantization in (None, "int4"):
        kernels = select_kernels(CPU, torch.float32, quantization=quantization)
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="ingine.engine.models.loader"):
            model = load_model(path, dtype=torch.float32, device=CPU, kernels=kernels)
        assert caplog.messages == [f"{path}: quantised matrices: 13 int4-g32"]
        assert model.numerics() == ["as-stored-13"]
        x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
        ours, expected = (
            one.layers[0].attention.qkv_proj(x).split([64, 32, 32], 1) for one in (model, exact)
        )
        for name, one, other in zip(("q_proj", "k_proj", "v_proj"), ours, expected, strict=True):
            error = ((one - other).norm() / other.norm()).item()
            # Of activations in int8; of none; of weights in four bits too, but eight for values.
            if name != part:
                assert 1e-4 < error < 0.02
            elif quantization is None:
                assert error < 1e-5
            else:
                assert 0.02 < error < 0.15 if name == "q_proj" else 1e-4 < error < 0.015


@needs_interpreter
@pytest.mark.parametrize("name", ["gptq", "fp8-block"])
def test_triton_s_products_give_a_model_its_logits(name, tmp_path):
    from ingine.engine.kernels.layers.triton_weights import TritonWeights

    path, dense = make(tmp_path, name)
    with pytest.MonkeyPatch.context() as monkeypatch:
        round_to_nearest(monkeypatch)
        kernels = replace(REFERENCE, weights=TritonWeights())
        model = load_model(path, dtype=torch.bfloat16, device=CPU, kernels=kernels)
        ours = logits(model)
    expected = logits(load(dense, torch.bfloat16))
    assert (ours - expected).abs().mean() < 0.03 * expected.abs().mean()


def test_what_a_format_does_not_keep_is_dense_before_it_comes_to_another_device(tmp_path, monkeypatch):
    """One that has not every type; "meta" stands in for it, and holds no numbers."""
    path, _ = make(tmp_path, "fp8-block")
    monkeypatch.setattr(PlainWeights, "pack_stored", pytest.fail)
    monkeypatch.setattr(PlainWeights, "pack", lambda self, weight, bias: weight)
    model = load_model(path, dtype=torch.bfloat16, device=torch.device("meta"), kernels=REFERENCE)
    assert {linear.product.dtype for linear in model.linears()} == {torch.bfloat16}
    assert {linear.product.device.type for linear in model.linears()} == {"meta"}


# ----------------------------------------------------------------------------------------- several ranks


@pytest.mark.parametrize(
    ("name", "num_kept", "reason"),
    [
        ("w4a16", 12, "0 to 48 divides groups of columns of 32"),
        ("w4a16-channel-asym", 14, None),
        ("gptq-desc_act", 10, "desc_act"),
        ("deepseek", 12, "0 to 48 divides blocks of 32"),
        ("fp8", 14, None),
    ],
)
def test_a_rank_keeps_its_part_of_what_is_stored_if_that_can_be_cut(
    name, num_kept, reason, tmp_path, caplog, monkeypatch
):
    path, dense = make(tmp_path, name)
    plain = load_file(dense / "model.safetensors")
    monkeypatch.setattr(Recording, "keeps", lambda self, part, dtype: True)
    for rank in (1, 0):
        caplog.clear()
        weights, parallel = Recording(), TensorParallel(rank, 2, CPU)
        kernels = replace(REFERENCE, weights=weights)
        with caplog.at_level(logging.INFO, logger="ingine.engine.models.loader"):
            load_model(path, dtype=torch.float32, device=CPU, kernels=kernels, parallel=parallel)
        [query, _, value], *others = weights.parts
        assert torch.equal(query.dense(), plain[f"{LAYER}.self_attn.q_proj.weight"].chunk(2)[rank])
        assert torch.equal(value.dense(), plain[f"{LAYER}.self_attn.v_proj.weight"].chunk(2)[rank])
        output = [parts[0] for parts in others if len(parts) == 1]
        if name != "gptq-desc_act":
            expected = plain[f"{LAYER}.self_attn.o_proj.weight"].chunk(2, dim=1)[rank]
            assert torch.equal(output[0].dense(), expected)
        assert sum(map(len, weights.parts)) == num_kept
    [message] = caplog.messages
    assert ("converted" in message) == (reason is not None)
    assert reason is None or reason in message


# ------------------------------------------------------------------------------------- what a file may hold


def test_a_module_may_be_left_out(tmp_path):
    """The file says so, whatever the lists of config.json say."""
    path, dense = make(tmp_path, "w4a16")
    leave_out(path, dense, f"{LAYER}.mlp.up_proj")
    assert_same(logits(load(path)), hf_logits(dense, PROMPT))


@pytest.mark.parametrize("tied", [False, True])
def test_an_output_matrix_may_be_quantised(tied, tmp_path):
    """The matrix has 259 rows, with a scale for each 16 by 32 block, and for the last three rows."""
    path, dense = make(tmp_path, "deepseek", tie_word_embeddings=tied)
    weight = load_file(dense / "model.safetensors")["model.embed_tokens.weight"].flip(0)
    padded = torch.cat((weight, torch.zeros(13, 64)))
    parts, rounded = pack("deepseek", padded)
    head = {"lm_head.weight": parts["weight"][:259], "lm_head.weight_scale_inv": parts["weight_scale_inv"]}
    edit_weights(path, lambda tensors: tensors | {key: one.contiguous() for key, one in head.items()})
    edit_weights(dense, lambda tensors: tensors | {"lm_head.weight": rounded[:259].contiguous()})
    (dense / "config.json").write_text(
        json.dumps(json.loads((dense / "config.json").read_text()) | {"tie_word_embeddings": False})
    )
    assert_same(logits(load(path)), hf_logits(dense, PROMPT))


MISSING = {
    "awq": f"{LAYER}.mlp.up_proj.qzeros",
    "gptq": f"{LAYER}.self_attn.q_proj.scales",
    "w4a16": f"{LAYER}.mlp.down_proj.weight_shape",
    "fp8": f"{LAYER}.mlp.down_proj.weight_scale",
}


@pytest.mark.parametrize("name", MISSING)
def test_what_is_missing_is_named_before_anything_is_read(name, tmp_path, monkeypatch):
    path, _ = make(tmp_path, name)
    edit_weights(path, lambda tensors: {key: one for key, one in tensors.items() if key != MISSING[name]})
    monkeypatch.setattr("ingine.engine.models.checkpoint.opened", pytest.fail)
    with pytest.raises(ConfigError, match=f"missing: {MISSING[name]}"):
        load(path)


def test_a_whole_module_that_is_missing_is_named(tmp_path):
    path, _ = make(tmp_path, "gptq")
    edit_weights(
        path, lambda tensors: {key: one for key, one in tensors.items() if "1.mlp.up_proj" not in key}
    )
    with pytest.raises(ConfigError, match=r"weights are missing: model\.layers\.1\.mlp\.up_proj\.weight"):
        load(path)


def test_tensors_of_another_method_have_no_place(tmp_path):
    path, _ = make(tmp_path, "gptq")
    config = json.loads((path / "config.json").read_text()) | {"quantization_config": CHECKPOINTS["fp8"]}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match=r"g_idx|qweight|qzeros"):
        load(path)


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("model.norm.weight", r"holds model\.norm\.weight in I8; use weights that are not quantised"),
        ("model.embed_tokens.weight", r"missing: model\.embed_tokens\.weight_scale"),
    ],
)
def test_what_has_no_scales_is_not_quantised(key, says, tmp_path):
    path, _ = make(tmp_path, "w8a8")
    edit_weights(path, lambda tensors: tensors | {key: tensors[key].to(torch.int8)})
    with pytest.raises(ConfigError, match=says):
        load(path)
