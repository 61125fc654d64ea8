"""From a folder of safetensors to a decoder, shard by shard, without a second copy of all weights.

Packing copies one matrix at a time. An int8 model with a tied embedding keeps the matrix in bfloat16 besides,
for the embedding.
"""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ingine.errors import ConfigError
from ingine.kernels import Kernels
from ingine.models.checkpoint import EMBEDDING, HEAD, Checkpoint, opened, some
from ingine.models.config import ModelConfig
from ingine.models.decoder import Decoder
from ingine.models.weight_shapes import expected_shapes
from ingine.parallel import SINGLE, TensorParallel, shard

logger = logging.getLogger(__name__)

SPLIT_DIM = {
    "embed_tokens": 0,
    "q_proj": 0,
    "k_proj": 0,
    "v_proj": 0,
    "o_proj": 1,
    "gate_proj": 0,
    "up_proj": 0,
    "down_proj": 1,
    "lm_head": 0,
}
"""Along which dimension of its weight a module is split over the ranks: 0, by outputs (and so is its bias);
1, by inputs, so that the ranks' results are summed. Other modules are whole on every rank."""


def load_model(
    path: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    kernels: Kernels,
    parallel: TensorParallel = SINGLE,
) -> Decoder:
    """The model in the Hugging Face folder `path`, its weights in `dtype` on `device`, ready to run; of a
    `parallel` of several ranks this rank's part.

    Raises ConfigError (or its UnsupportedModel) that names the file or the weights at fault.
    """
    model = load_weights(path, dtype=dtype, device=device, kernels=kernels, parallel=parallel)
    model.pack_weights()
    return model


def load_weights(
    path: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    kernels: Kernels,
    parallel: TensorParallel = SINGLE,
) -> Decoder:
    """As `load_model`, the weights still as the checkpoint has them, for `Decoder.checkpoint_tensors`."""
    config, checkpoint = open_checkpoint(path)
    if config.tie_word_embeddings and checkpoint.has_a_head_of_its_own():
        logger.warning(
            "%s: %s and %s differ, so they are not tied, although config.json says tie_word_embeddings",
            *(path, EMBEDDING, HEAD),
        )
        config = replace(config, tie_word_embeddings=False)
    model = Decoder(config, kernels, dtype=dtype, device=device, parallel=parallel).eval()
    _copy_weights(checkpoint, model.checkpoint_tensors(), parallel)
    return model


def open_checkpoint(path: Path) -> tuple[ModelConfig, Checkpoint]:
    """What config.json says, and the weights that are there for it: only their files' headers are read.

    Raises ConfigError (or its UnsupportedModel) where no model could be loaded from that.
    """
    config, checkpoint = ModelConfig.from_folder(path), Checkpoint(path)
    _check_tensors(path, checkpoint, config)
    return config, checkpoint


def _check_tensors(path: Path, checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Raises unless the checkpoint has exactly the tensors that such a model has: what config.json says alone
    allocates nothing.
    """
    expected, stored = expected_shapes(config), checkpoint.shape_of
    if _is_stored_as_head(checkpoint, config):
        expected[HEAD] = expected.pop(EMBEDDING)
    elif config.tie_word_embeddings and HEAD in stored:
        expected[HEAD] = expected[EMBEDDING]  # the same matrix once more
    if unexpected := stored.keys() - expected.keys():
        raise ConfigError(f"{path}: weights that this architecture has no place for: {some(unexpected)}")
    if missing := expected.keys() - stored.keys():
        raise ConfigError(f"{path}: weights are missing: {some(missing)}")
    for name, shape in stored.items():
        if shape != expected[name]:
            raise ConfigError(
                f"{checkpoint.file_of[name]}: {name} is {shape}, config.json says {expected[name]}"
            )


def _is_stored_as_head(checkpoint: Checkpoint, config: ModelConfig) -> bool:
    """Of a tied matrix: either of the two names may be the one that is stored."""
    return config.tie_word_embeddings and EMBEDDING not in checkpoint.file_of and HEAD in checkpoint.file_of


@torch.no_grad()
def _copy_weights(checkpoint: Checkpoint, tensors: dict[str, Tensor], parallel: TensorParallel) -> None:
    """Into `tensors`, all of which the checkpoint holds, but that of a tied matrix by its other name."""
    if EMBEDDING not in checkpoint.file_of:
        tensors[HEAD] = tensors.pop(EMBEDDING)
    for file_path, names in checkpoint.names_by_file().items():
        with opened(file_path) as file:
            for name in filter(tensors.__contains__, names):
                _copy_own_part(name, tensors[name], file.get_slice(name), parallel)


def _copy_own_part(name: str, target: Tensor, weight: Any, parallel: TensorParallel) -> None:
    """weight: a slice of safetensors', which reads no more than it is asked for."""
    dim = _split_dim(name)
    if dim is not None:
        own = shard(weight.get_shape()[dim], parallel.rank, parallel.size)
        length = own.stop - own.start
        target.narrow(dim, 0, length).copy_(weight[own] if dim == 0 else weight[:, own])
        target.narrow(dim, length, target.shape[dim] - length).zero_()  # where a vocabulary ends
    elif _is_added_to_a_sum(name) and parallel.rank > 0:
        target.zero_()
    else:
        target.copy_(weight[:])


def _split_dim(name: str) -> int | None:
    return None if _is_added_to_a_sum(name) else SPLIT_DIM.get(_module(name))


def _is_added_to_a_sum(name: str) -> bool:
    """A bias that the sum over the ranks is to have once."""
    return name.endswith(".bias") and SPLIT_DIM.get(_module(name)) == 1


def _module(name: str) -> str:
    return name.split(".")[-2]
