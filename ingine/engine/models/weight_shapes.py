"""Shapes of the tensors of a model's checkpoint, which are compared with the files before any allocation."""

from dataclasses import replace

import torch

from ingine.engine.kernels.select import REFERENCE
from ingine.engine.models.config import ModelConfig
from ingine.engine.models.decoder import Decoder

_FIRST_LAYER = "model.layers.0."


def expected_shapes(config: ModelConfig) -> dict[str, list[int]]:
    """Return the shape of every tensor of the whole model, by Hugging Face name, without allocating it."""
    one_layer = replace(config, num_layers=1, sliding_windows=config.sliding_windows[:1])
    model = Decoder(one_layer, REFERENCE, dtype=torch.float32, device=torch.device("meta"))
    shapes = {name: list(tensor.shape) for name, tensor in model.checkpoint_tensors().items()}
    layer = {
        name.removeprefix(_FIRST_LAYER): shape
        for name, shape in shapes.items()
        if name.startswith(_FIRST_LAYER)
    }
    for index in range(1, config.num_layers):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    return shapes
