"""The importance that a model measures with a few tokens while loading, and its effect on four bits."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ingine.engine.kernels.layers.int4 import quantize_int4
from ingine.engine.kernels.layers.int4_weights import Int4Weights
from ingine.engine.kernels.layers.linear import Linear
from ingine.engine.kernels.layers.weights import PlainWeights
from ingine.engine.kernels.native.weights import NativeInt8
from ingine.engine.kernels.select import REFERENCE, select_kernels
from ingine.engine.models.decoder import Decoder
from ingine.engine.models.importance import NUM_TOKENS, STRIDE
from ingine.engine.models.loader import load_model, load_weights
from tests.engine.builds import library
from tests.engine.marks import needs_native
from tests.engine.packed import PackedModel, PagedSequence
from tests.tiny_models import VOCAB_SIZE, make_tiny_model

CPU = torch.device("cpu")


class Recording(PlainWeights):
    """Rounds nothing, and keeps what it is told of importance, in the order of packing."""

    def __init__(self) -> None:
        self.probe = PlainWeights()
        self.importances: list[Tensor | None] = []

    def pack_delicate(self, weight, bias, num_delicate, importance=None):
        self.importances.append(importance)
        return self.pack(weight, bias)


def load(path: Path, weights) -> Decoder:
    return load_model(path, dtype=torch.float32, device=CPU, kernels=replace(REFERENCE, weights=weights))


def logits(model: Decoder, token_ids: list[int]) -> Tensor:
    return torch.cat(PackedModel(model).step((PagedSequence(token_ids), len(token_ids))))


@pytest.mark.parametrize("tied", [False, True])
def test_importance_is_the_mean_square_of_what_each_matrix_of_a_layer_is_multiplied_with(tied, tmp_path):
    path = make_tiny_model(tmp_path, "qwen3", tie_word_embeddings=tied)
    recording = Recording()
    load(path, recording)
    expected: list[Tensor] = []
    model = load(path, PlainWeights())
    for layer in model.layers:
        for module in layer.modules():
            if isinstance(module, Linear):
                module.register_forward_pre_hook(
                    lambda _, args: expected.append(args[0].square().mean(dim=0))
                )
    logits(model, [index * STRIDE % VOCAB_SIZE for index in range(NUM_TOKENS)])
    assert len(expected) == 8
    assert recording.importances[8:] == ([] if tied else [None])  # the output matrix
    for ours, exact in zip(recording.importances, expected, strict=False):
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-6)


def test_a_model_that_is_loaded_so_computes_what_it_does_otherwise(tmp_path):
    path = make_tiny_model(tmp_path, max_position_embeddings=300)  # the probe is shorter then
    recording = Recording()
    assert torch.equal(
        logits(load(path, recording), [3, 1, 4]), logits(load(path, PlainWeights()), [3, 1, 4])
    )
    assert len(recording.importances) == 9


def outlier_model(path: Path) -> Path:
    """A model whose activations are 30 times as large in some columns, as in real models."""
    make_tiny_model(path)
    model = load_weights(path, dtype=torch.float32, device=CPU, kernels=REFERENCE)
    tensors = {name: tensor.detach().clone() for name, tensor in model.checkpoint_tensors().items()}
    for name, tensor in tensors.items():
        if "layernorm" in name:
            tensor[5::32] *= 30
        if name.split(".")[-2] in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
            tensor[:, 5::32] /= 30
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")
    return path


@needs_native
def test_it_spares_what_matters_in_four_bits(tmp_path):
    path = outlier_model(tmp_path)
    token_ids = [(7 * index) % VOCAB_SIZE for index in range(100)]
    exact = logits(load(path, PlainWeights()), token_ids)
    kernels = select_kernels(CPU, torch.float32, quantization="int4")
    blind = replace(
        kernels, weights=Int4Weights(NativeInt8(library("native"), torch.float32, PlainWeights()))
    )
    errors = [
        (logits(load_model(path, dtype=torch.float32, device=CPU, kernels=one), token_ids) - exact).norm()
        for one in (kernels, blind)
    ]
    assert errors[0] < 0.6 * errors[1]


@needs_native
def test_a_model_is_quantised_to_the_same_bits_each_time_with_any_number_of_threads(tmp_path):
    path = make_tiny_model(tmp_path, dtype=torch.bfloat16)
    kernels = select_kernels(CPU, torch.bfloat16, quantization="int4")
    num_threads, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            model = load_model(path, dtype=torch.bfloat16, device=CPU, kernels=kernels)
            found.append(logits(model, list(range(40))))
    finally:
        torch.set_num_threads(num_threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def weighted_error(weight: Tensor, dense: Tensor, importance: Tensor) -> float:
    return ((dense - weight).square() * importance).sum().item()


def test_errors_are_where_they_cost_little():
    generator = torch.Generator().manual_seed(0)
    weight, importance = (torch.randn(64, 96, generator=generator), torch.rand(96, generator=generator) ** 8)
    blind, seeing = quantize_int4(weight).dense(), quantize_int4(weight, importance=importance).dense()
    assert weighted_error(weight, seeing, importance) < 0.6 * weighted_error(weight, blind, importance)
    importance[7] = 1e6
    dense = quantize_int4(weight, importance=importance).dense()
    torch.testing.assert_close(dense[:, 7], weight[:, 7], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("number", [0.0, float("nan"), float("inf")])
def test_importance_that_says_nothing_changes_nothing(number):
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    importance = torch.full((64,), number)
    assert torch.equal(quantize_int4(weight, importance=importance).dense(), quantize_int4(weight).dense())
