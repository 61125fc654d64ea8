"""The weights of a GGUF file by their Hugging Face names; quantised ones stay in the mapped file."""

import re
import warnings
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from ingine.engine.files.model_files import gguf_parts
from ingine.engine.kernels.layers.stored import GGUF_KINDS, GGUFMatrix
from ingine.engine.models.checkpoint import EMBEDDING, HEAD, Checkpoint
from ingine.engine.models.config import ModelConfig
from ingine.engine.models.gguf_config import ROPE_FREQS
from ingine.engine.models.gguf_file import FAMILIES, GGUFFile
from ingine.engine.models.gguf_record import check_record
from ingine.errors import ConfigError, UnsupportedModel

DENSE = {
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
    GGMLQuantizationType.F32: torch.float32,
}

_NAME = re.compile(r"(blk\.(?P<layer>0|[1-9][0-9]{0,4})\.)?(?P<tensor>[a-z_]+)\.(?P<kind>weight|bias)")
_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class GGUFCheckpoint(Checkpoint):
    def __init__(self, file: GGUFFile):
        """Map the file's tensors. Raises UnsupportedModel for a tensor that no supported model has."""
        self._file = file
        self.name_of = {_hf_name(name): name for name in file.tensors if name != ROPE_FREQS}
        self.file_of = {hf_name: file.tensors[name].path for hf_name, name in self.name_of.items()}
        self.shape_of = {
            hf_name: list(reversed(file.tensors[name].shape)) for hf_name, name in self.name_of.items()
        }

    @classmethod
    def of_folder(cls, folder: Path, path: Path, config: ModelConfig) -> "GGUFCheckpoint":
        """Open the weights of `folder` in its file `path`; `config` is from the folder's config.json.

        Raises ConfigError (or its UnsupportedModel), also if the file contradicts the rest of the folder.
        """
        file = GGUFFile.open(path)
        check_record(folder, gguf_parts(path), file.header_sha256)
        num_heads = file.integer("attention.head_count")
        num_kv_heads = file.integer("attention.head_count_kv", num_heads)
        # Of the metadata, only these keys affect how tensors are read.
        for key, says, expected in (
            ("head_count", num_heads, config.num_heads),
            ("head_count_kv", num_kv_heads, config.num_kv_heads),
        ):
            if says != expected:
                name = f"{file.arch}.attention.{key}"
                raise ConfigError(f"{path}: {name} is {says}, config.json says {expected}")
        return cls(file)

    def dtype_of(self, name: str) -> torch.dtype:
        """Return the tensor's own dtype, or float32, which holds all of its numbers, if it is quantised."""
        return DENSE.get(self._file.tensor(self.name_of[name]).tensor_type, torch.float32)

    def read(self, name: str, *part: slice) -> Tensor:
        """Read a tensor, dequantised unless its type is in `DENSE`. Raises ConfigError, UnsupportedModel."""
        stored = self.name_of[name]
        try:
            weight = torch.from_numpy(np.require(self._file.dequantized(stored), requirements="W"))
        except OSError as error:
            raise ConfigError(f"{self.file_of[name]} cannot be read: {error}") from error
        order = self._row_order(name)
        weight = weight if order is None else weight[order]
        return weight[part or slice(None)].to(self.dtype_of(name))

    def matrix(self, name: str) -> GGUFMatrix | None:
        tensor = self._file.tensor(self.name_of[name])
        if tensor.tensor_type not in GGUF_KINDS or len(tensor.shape) != 2:
            return None
        columns, rows = tensor.shape
        # Each matrix has a mapping of its own, so that pages of a matrix that becomes dense do not stay.
        data = _not_written(tensor.mapped())
        return GGUFMatrix((rows, columns), tensor.tensor_type, data, self._row_order(name))

    def has_a_head_of_its_own(self) -> bool:
        if not {EMBEDDING, HEAD} <= self.name_of.keys():
            return False
        one, other = (self._file.tensor(self.name_of[name]) for name in (EMBEDDING, HEAD))
        same = one.tensor_type == other.tensor_type and one.shape == other.shape
        return not (same and np.array_equal(one.read(), other.read()))

    def _row_order(self, name: str) -> Tensor | None:
        """Return the order that undoes llama.cpp's reordering of a head's rows, from (x0, x1, ..., y0, y1,
        ...) to (x0, y0, x1, y1, ...); None if the rows are in order.
        """
        if not FAMILIES[self._file.arch].permuted:
            return None
        num_heads = self._file.integer("attention.head_count")
        if ".k_proj." in name:
            num_heads = self._file.integer("attention.head_count_kv", num_heads)
        elif ".q_proj." not in name:
            return None
        return torch.arange(self.shape_of[name][0]).view(num_heads, -1, 2).transpose(1, 2).flatten()


def _not_written(numbers: np.ndarray) -> Tensor:
    """Return a tensor over the same memory, without torch's warning that it is read-only."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writ", UserWarning)
        return torch.from_numpy(numbers)


def _hf_name(name: str) -> str:
    """Convert `blk.3.attn_q.weight` to `model.layers.3.self_attn.q_proj.weight`, one-to-one."""
    match = _NAME.fullmatch(name)
    if not match or match["tensor"] not in _TENSORS:
        raise UnsupportedModel(f"unsupported: the tensor {name!r:.100} has no place in the model")
    layer = f"model.layers.{match['layer']}." if match["layer"] else ""
    return f"{layer}{_TENSORS[match['tensor']]}.{match['kind']}"
