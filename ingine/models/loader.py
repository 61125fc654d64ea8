"""From a folder of safetensors to a decoder, shard by shard, without a second copy of all weights.

Packing copies one matrix at a time. An int8 model with a tied embedding keeps the matrix in bfloat16 besides,
for the embedding.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ingine.errors import ConfigError
from ingine.kernels import Kernels
from ingine.models.config import ModelConfig, read_json
from ingine.models.decoder import Decoder

WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"


def load_model(path: Path, *, dtype: torch.dtype, device: torch.device, kernels: Kernels) -> Decoder:
    """The model in the Hugging Face folder `path`, its weights in `dtype` on `device`, ready to run.

    Raises ConfigError (or its UnsupportedModel) that names the file or the weights at fault.
    """
    model = load_weights(path, dtype=dtype, device=device, kernels=kernels)
    model.pack_weights()
    return model


def load_weights(path: Path, *, dtype: torch.dtype, device: torch.device, kernels: Kernels) -> Decoder:
    """As `load_model`, the weights still as the checkpoint has them, for `Decoder.checkpoint_tensors`."""
    config = ModelConfig.from_folder(path)
    shards = _shards(path)
    model = Decoder(config, kernels, dtype=dtype, device=device).eval()
    tensors = model.checkpoint_tensors()
    for shard in shards:
        _load_shard(shard, tensors, tied=config.tie_word_embeddings)
    if tensors:
        raise ConfigError(f"{path}: weights are missing: {_some(tensors)}")
    return model


def _shards(path: Path) -> list[Path]:
    if (path / WEIGHTS_INDEX).exists():
        weight_map = read_json(path / WEIGHTS_INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ConfigError(f"{path / WEIGHTS_INDEX} has no weight_map")
        shards = [path / name for name in sorted(set(weight_map.values()))]
    else:
        shards = [path / WEIGHTS]
    for shard in shards:
        if not shard.exists():
            raise ConfigError(f"{shard} does not exist: there are no safetensors here, or not all of them")
    return shards


@torch.no_grad()
def _load_shard(shard: Path, tensors: dict[str, Tensor], *, tied: bool) -> None:
    """Copy what `shard` holds into `tensors`, and take from there what is done."""
    try:
        with safe_open(shard, framework="pt") as file:
            names = [name for name in file.keys() if not _redundant(name, tied=tied)]  # noqa: SIM118 (no mapping)
            if unexpected := [name for name in names if name not in tensors]:
                raise ConfigError(
                    f"{shard}: weights that this architecture has no place for: {_some(unexpected)}"
                )
            for name in names:
                target, weight = tensors.pop(name), file.get_tensor(name)
                if target.shape != weight.shape:
                    raise ConfigError(
                        f"{shard}: {name} is {list(weight.shape)}, config.json says {list(target.shape)}"
                    )
                target.copy_(weight)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{shard} is damaged or not a safetensors file: {error}") from error


def _redundant(name: str, *, tied: bool) -> bool:
    """Some checkpoints also hold what can be computed (old Llamas), or the tied output matrix once more."""
    return name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight")


def _some(names: Iterable[str], limit: int = 5) -> str:
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
