"""The weights of a GGUF file by their Hugging Face names, quantised ones as they lie in the mapped file."""

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
        """Raises UnsupportedModel for a tensor that no model here has."""
        self._file = file
        self.name_of = {_hf_name(name): name for name in file.tensors if name != ROPE_FREQS}
        self.file_of = {hf_name: file.tensors[name].path for hf_name, name in self.name_of.items()}
        self.shape_of = {
            hf_name: list(reversed(file.tensors[name].shape)) for hf_name, name in self.name_of.items()
        }

    @classmethod
    def of_folder(cls, folder: Path, path: Path, config: ModelConfig) -> "GGUFCheckpoint":
        """The weights of `folder`, whose `config` is that of config.json, in the file `path` there.

        Raises ConfigError (or its UnsupportedModel), also for a file that contradicts the rest of the folder.
        """
        file = GGUFFile.open(path)
        check_record(folder, gguf_parts(path), file.header_sha256)
        num_heads = file.integer("attention.head_count")
        num_kv_heads = file.integer("attention.head_count_kv", num_heads)
        # Nothing else that is read of the metadata here decides how tensors are read.
        for key, says, expected in (
            ("head_count", num_heads, config.num_heads),
            ("head_count_kv", num_kv_heads, config.num_kv_heads),
        ):
            if says != expected:
                name = f"{file.arch}.attention.{key}"
                raise ConfigError(f"{path}: {name} is {says}, config.json says {expected}")
        return cls(file)

    def dtype_of(self, name: str) -> torch.dtype:
        """A type that holds all of a tensor's numbers, and is its own if it is not quantised."""
        return DENSE.get(self._file.tensor(self.name_of[name]).tensor_type, torch.float32)

    def read(self, name: str, *part: slice) -> Tensor:
        """Dequantised, if it is not of `DENSE`. Raises ConfigError, UnsupportedModel."""
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
        # A mapping of its own, which goes when the matrix does: pages of what becomes dense do not stay.
        data = _not_written(tensor.mapped())
        return GGUFMatrix((rows, columns), tensor.tensor_type, data, self._row_order(name))

    def has_a_head_of_its_own(self) -> bool:
        if not {EMBEDDING, HEAD} <= self.name_of.keys():
            return False
        one, other = (self._file.tensor(self.name_of[name]) for name in (EMBEDDING, HEAD))
        same = one.tensor_type == other.tensor_type and one.shape == other.shape
        return not (same and np.array_equal(one.read(), other.read()))

    def _row_order(self, name: str) -> Tensor | None:
        """Where llama.cpp reorders a head's rows from (x0, x1, ..., y0, y1, ...) to (x0, y0, x1, y1, ...)."""
        if not FAMILIES[self._file.arch].permuted:
            return None
        num_heads = self._file.integer("attention.head_count")
        if ".k_proj." in name:
            num_heads = self._file.integer("attention.head_count_kv", num_heads)
        elif ".q_proj." not in name:
            return None
        return torch.arange(self.shape_of[name][0]).view(num_heads, -1, 2).transpose(1, 2).flatten()


def _not_written(numbers: np.ndarray) -> Tensor:
    """Over the same memory, of which torch would warn that nobody may write to it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writ", UserWarning)
        return torch.from_numpy(numbers)


def _hf_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`. No two names give the same."""
    match = _NAME.fullmatch(name)
    if not match or match["tensor"] not in _TENSORS:
        raise UnsupportedModel(f"unsupported: the tensor {name!r:.100} has no place in the model")
    layer = f"model.layers.{match['layer']}." if match["layer"] else ""
    return f"{layer}{_TENSORS[match['tensor']]}.{match['kind']}"
