"""Makes Hugging Face folders of GGUF files: with links to the files, or with dequantised weights."""

import errno
import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ingine.engine.files.model_files import WEIGHTS, WEIGHTS_INDEX, gguf_links, gguf_parts
from ingine.engine.models.checkpoint import some
from ingine.engine.models.config import ModelConfig
from ingine.engine.models.gguf_checkpoint import DENSE, GGUFCheckpoint
from ingine.engine.models.gguf_config import config_of, recommended_sampling
from ingine.engine.models.gguf_file import GGUFFile
from ingine.engine.models.gguf_record import write_record
from ingine.engine.models.gguf_tokenizer import end_token_ids, save_tokenizer
from ingine.engine.models.weight_shapes import expected_shapes
from ingine.errors import ConfigError, UnsupportedModel

MAX_SHARD_BYTES = 2 << 30
Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes in total."""


def convert_gguf(gguf_path: Path, out_dir: Path, *, progress: Progress | None = None) -> None:
    """Write the model in `gguf_path` to the new folder `out_dir`: config, weights, tokenizer, chat template.

    If the model has several files, `gguf_path` is any of them. `out_dir` appears whole or not at all. There
    must be only one caller at a time for one `out_dir`. Raises ConfigError for a damaged file or a folder
    that cannot be written, UnsupportedModel for a model that would not run here.
    """
    with _whole(gguf_path, out_dir) as folder:
        file = GGUFFile.open(gguf_path)
        checkpoint = GGUFCheckpoint(file)
        dtype = DENSE.get(file.tensor("token_embd.weight").tensor_type, torch.float32)
        _describe(file, checkpoint, dtype, folder)
        _save_weights(checkpoint, folder, progress or (lambda done, total: None))


def link_gguf(gguf_path: Path, out_dir: Path) -> None:
    """Write a folder as `convert_gguf` does, with links to the GGUF files as weights; read only headers."""
    with _whole(gguf_path, out_dir) as folder:
        file = GGUFFile.open(gguf_path)
        # Almost all quantised models were bfloat16 before.
        dtype = DENSE.get(file.tensor("token_embd.weight").tensor_type, torch.bfloat16)
        _describe(file, GGUFCheckpoint(file), dtype, folder)
        for part, link in zip(gguf_parts(file.path), gguf_links(folder, file.path), strict=True):
            link.symlink_to(part.resolve())
        write_record(folder, file.header_sha256)


@contextmanager
def _whole(gguf_path: Path, out_dir: Path) -> Iterator[Path]:
    """Yield a temporary folder to fill. It becomes `out_dir` if the block ends without an error."""
    partial = out_dir.with_name(f"{out_dir.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(out_dir)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{gguf_path}: its folder {out_dir} cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _describe(file: GGUFFile, checkpoint: GGUFCheckpoint, dtype: torch.dtype, folder: Path) -> None:
    """Write everything except the weights, and check that the file has the tensors of such a model."""
    _write_json(folder / "config.json", config_of(file) | {"dtype": str(dtype).removeprefix("torch.")})
    _check_tensors(file, checkpoint, _read_config(folder, file.path))
    generation_config = {"eos_token_id": end_token_ids(file)} | recommended_sampling(file)
    _write_json(folder / "generation_config.json", generation_config)
    save_tokenizer(file, folder)


def _read_config(folder: Path, gguf_path: Path) -> ModelConfig:
    try:
        return ModelConfig.from_folder(folder)
    except ConfigError as error:  # it names a temporary file
        said = str(error).replace(str(folder / "config.json"), f"{gguf_path}, of which a config.json is made")
        raise type(error)(said.replace(str(folder), str(gguf_path))) from error


def _check_tensors(file: GGUFFile, checkpoint: GGUFCheckpoint, config: ModelConfig) -> None:
    """Raise an error unless the file has exactly the tensors of such a model: other folders must not stay."""
    expected, stored = expected_shapes(config), checkpoint.shape_of
    if missing := expected.keys() - stored.keys():
        raise ConfigError(f"{file.path}: weights are missing: {some(missing)}")
    for hf_name, shape in stored.items():
        name = checkpoint.name_of[hf_name]
        if hf_name not in expected:
            raise UnsupportedModel(f"unsupported: the tensor {name!r:.100} has no place in the model")
        if shape != expected[hf_name]:
            raise ConfigError(f"{file.path}: {name} is {shape}, its metadata say {expected[hf_name]}")


def _save_weights(checkpoint: GGUFCheckpoint, folder: Path, progress: Progress) -> None:
    """Save the weights in shards, of which only one is in memory at a time."""
    total = sum(
        math.prod(shape) * checkpoint.dtype_of(name).itemsize for name, shape in checkpoint.shape_of.items()
    )
    if total > (free := shutil.disk_usage(folder).free):  # fail before the disk is full
        raise OSError(errno.ENOSPC, f"the weights take {total} bytes, and there are {free} left", str(folder))
    weight_map: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    shards: list[Path] = []
    done = shard_bytes = 0

    def flush() -> None:
        shards.append(folder / f"model-{len(shards) + 1:05}.safetensors")
        save_file(shard, shards[-1], metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, shards[-1].name))
        shard.clear()

    for name in checkpoint.shape_of:
        tensor = checkpoint.read(name)
        if shard and shard_bytes + tensor.nbytes > MAX_SHARD_BYTES:
            flush()
            shard_bytes = 0
        shard[name] = tensor
        shard_bytes += tensor.nbytes
        done += tensor.nbytes
        progress(done, total)
    flush()
    if len(shards) == 1:
        shards[0].rename(folder / WEIGHTS)
    else:
        _write_json(folder / WEIGHTS_INDEX, {"metadata": {"total_size": done}, "weight_map": weight_map})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
