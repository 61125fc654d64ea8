"""From a folder of safetensors to a decoder, shard by shard, without a second copy of all weights.

Packing copies one matrix at a time. An int8 model with a tied embedding keeps the matrix in bfloat16 besides,
for the embedding.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ingine.errors import ConfigError
from ingine.kernels import Kernels
from ingine.model_files import weight_files
from ingine.models.config import ModelConfig
from ingine.models.decoder import Decoder
from ingine.parallel import SINGLE, TensorParallel, shard

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
    config = ModelConfig.from_folder(path)
    files = weight_files(path)
    model = Decoder(config, kernels, dtype=dtype, device=device, parallel=parallel).eval()
    tensors = model.checkpoint_tensors()
    for file in files:
        _load_file(file, tensors, config, parallel)
    if tensors:
        raise ConfigError(f"{path}: weights are missing: {_some(tensors)}")
    return model


@torch.no_grad()
def _load_file(path: Path, tensors: dict[str, Tensor], config: ModelConfig, parallel: TensorParallel) -> None:
    """Copy what the file holds into `tensors`, and take from there what is done."""
    tied = config.tie_word_embeddings
    try:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if not _redundant(name, tied=tied)]  # noqa: SIM118 (no mapping)
            if unexpected := [name for name in names if name not in tensors]:
                raise ConfigError(
                    f"{path}: weights that this architecture has no place for: {_some(unexpected)}"
                )
            for name in names:
                target, weight = tensors.pop(name), file.get_slice(name)
                expected = _whole_shape(name, target, config, parallel)
                if weight.get_shape() != expected:
                    raise ConfigError(f"{path}: {name} is {weight.get_shape()}, config.json says {expected}")
                _copy_own_part(name, target, weight, parallel)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path} is damaged or not a safetensors file: {error}") from error


def _whole_shape(name: str, target: Tensor, config: ModelConfig, parallel: TensorParallel) -> list[int]:
    """Of the tensor that `target` holds this rank's part of."""
    shape, dim = list(target.shape), _split_dim(name)
    if name in ("model.embed_tokens.weight", "lm_head.weight"):
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


def _redundant(name: str, *, tied: bool) -> bool:
    """Some checkpoints also hold what can be computed (old Llamas), or the tied output matrix once more."""
    return name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight")


def _some(names: Iterable[str], limit: int = 5) -> str:
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
