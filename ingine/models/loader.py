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
from ingine.models.checkpoint import EMBEDDING, HEAD, Checkpoint, some
from ingine.models.config import ModelConfig
from ingine.models.decoder import Decoder
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
    config, checkpoint = ModelConfig.from_folder(path), Checkpoint(path)
    if config.tie_word_embeddings and checkpoint.has_a_head_of_its_own():
        logger.warning(
            "%s: %s and %s differ, so they are not tied, although config.json says tie_word_embeddings",
            *(path, EMBEDDING, HEAD),
        )
        config = replace(config, tie_word_embeddings=False)
    model = Decoder(config, kernels, dtype=dtype, device=device, parallel=parallel).eval()
    _copy_weights(path, checkpoint, model.checkpoint_tensors(), config, parallel)
    return model


@torch.no_grad()
def _copy_weights(
    path: Path,
    checkpoint: Checkpoint,
    tensors: dict[str, Tensor],
    config: ModelConfig,
    parallel: TensorParallel,
) -> None:
    """Into `tensors`, which has to be exactly what the checkpoint holds."""
    if config.tie_word_embeddings and EMBEDDING not in checkpoint.file_of and HEAD in checkpoint.file_of:
        tensors[HEAD] = tensors.pop(EMBEDDING)  # either of the two may be the one that is stored
    missing = tensors.keys() - checkpoint.file_of.keys()
    unexpected = checkpoint.file_of.keys() - tensors.keys()
    if config.tie_word_embeddings and EMBEDDING in tensors:
        unexpected -= {HEAD}  # the same matrix once more
    if unexpected:
        raise ConfigError(f"{path}: weights that this architecture has no place for: {some(unexpected)}")
    if missing:
        raise ConfigError(f"{path}: weights are missing: {some(missing)}")
    for name, weight in checkpoint.slices():
        if name in tensors:
            expected = _whole_shape(name, tensors[name], config, parallel)
            if weight.get_shape() != expected:
                file = checkpoint.file_of[name]
                raise ConfigError(f"{file}: {name} is {weight.get_shape()}, config.json says {expected}")
            _copy_own_part(name, tensors[name], weight, parallel)


def _whole_shape(name: str, target: Tensor, config: ModelConfig, parallel: TensorParallel) -> list[int]:
    """Of the tensor that `target` holds this rank's part of."""
    shape, dim = list(target.shape), _split_dim(name)
    if name in (EMBEDDING, HEAD):
        shape[0] = config.vocab_size
    elif dim is not None:
        shape[dim] *= parallel.size
    return shape


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
