"""Ways to round weights to about four bits, and a checkpoint that favours none of them, for quality.py.

The only real model here comes out of a Q4_1 file. Its weights lie on that file's grid, so what has the same
grid would seem to lose nothing. `save_off_grid` therefore moves them: columns are scaled by random factors
and what feeds them by the inverse ones, which leaves the model's function as it was.
"""

import ctypes
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import save_file
from torch import Tensor

from ingine.engine.kernels.layers.int4 import GROUP_SIZE, LARGEST_CODE, quantize_int4
from ingine.engine.kernels.layers.int4_weights import quantize_q8_0
from ingine.engine.kernels.layers.weights import Embedding, Product, WeightFormat
from ingine.engine.kernels.select import REFERENCE
from ingine.engine.models.loader import load_weights

Q = GGMLQuantizationType
Rounding = Callable[[Tensor, Tensor | None], Tensor]
"""float32 [rows, columns] and the importance of the columns -> the rounded numbers, same shape."""


class Rounded(WeightFormat):
    """Rounds the weights alone; `inner` computes the products.

    Q8_0 applies to the same matrices as in int4.
    """

    def __init__(self, name: str, rounding: Rounding, inner: WeightFormat):
        self.name, self._rounding, self._inner, self.probe = name, rounding, inner, inner

    def pack(self, weight: Tensor, bias: Tensor | None) -> Product:
        return self.pack_delicate(weight, bias, 0)

    def pack_delicate(
        self, weight: Tensor, bias: Tensor | None, num_delicate: int, importance: Tensor | None = None
    ) -> Product:
        rows, delicate = weight.split([len(weight) - num_delicate, num_delicate])
        parts = [self._rounding(rows.float(), importance)] if len(rows) else []
        if num_delicate:
            parts.append(quantize_q8_0(delicate).dense())
        return self._inner.pack(torch.cat(parts).to(weight.dtype), bias)

    def pack_tied(self, weight: Tensor) -> tuple[Product, Embedding]:
        return self._inner.pack_tied(quantize_q8_0(weight).dense().to(weight.dtype))


def fitted(weight: Tensor, importance: Tensor | None) -> Tensor:
    return quantize_int4(weight, importance=importance).dense()


def fitted_64(weight: Tensor, importance: Tensor | None) -> Tensor:
    return quantize_int4(weight, 64, importance=importance).dense()


def fitted_blindly(weight: Tensor, _: Tensor | None) -> Tensor:
    return quantize_int4(weight).dense()


def end_to_end(weight: Tensor, _: Tensor | None) -> Tensor:
    """Round to 15 equal steps of each group's range."""
    groups = weight.view(-1, GROUP_SIZE)
    least = groups.amin(dim=1, keepdim=True).clamp_(max=0)
    step = (groups.amax(dim=1, keepdim=True).clamp_(min=0) - least).div_(LARGEST_CODE)
    return (((groups - least) / step).round_() * step + least).view(weight.shape)


def q4_0(weight: Tensor, _: Tensor | None) -> Tensor:
    return _there_and_back(gguf.quantize(weight.numpy(), Q.Q4_0), Q.Q4_0)


def q4_1(weight: Tensor, _: Tensor | None) -> Tensor:
    return _there_and_back(gguf.quantize(weight.numpy(), Q.Q4_1), Q.Q4_1)


METHODS: dict[str, tuple[Rounding, float]] = {
    "fitted, as int4, weights alone": (fitted, 5.0),
    "fitted, groups of 64": (fitted_64, 4.5),
    "fitted without importance": (fitted_blindly, 5.0),
    "end to end": (end_to_end, 5.0),
    "Q4_0": (q4_0, 4.5),
    "Q4_1": (q4_1, 5.0),
}
"""Method and bits per weight, by name.

A method rounds all matrices of the layers except the values' projection.
"""


def q4_k_of(ggml: Path) -> dict[str, tuple[Rounding, float]]:
    """llama.cpp's own Q4_K, from its library libggml-base.so: without and with an importance matrix."""
    library = ctypes.CDLL(ggml)
    quantize = library.ggml_quantize_chunk
    quantize.restype = ctypes.c_size_t
    quantize.argtypes = [ctypes.c_int, *2 * [ctypes.c_void_p], *3 * [ctypes.c_int64], ctypes.c_void_p]

    def q4_k(weight: Tensor, importance: Tensor | None) -> Tensor:
        """Round to Q4_K as if rows were whole blocks of 256, as in most models."""
        size, num_bytes = gguf.GGML_QUANT_SIZES[Q.Q4_K]
        columns = weight.shape[1]
        padded = torch.nn.functional.pad(weight, (0, -columns % size)).contiguous()
        blocks = np.zeros((len(padded), padded.shape[1] // size * num_bytes), np.uint8)
        address = None
        if importance is not None:
            costs = torch.nn.functional.pad(importance.float(), (0, -columns % size)).contiguous()
            address = costs.data_ptr()
        quantize(Q.Q4_K, padded.data_ptr(), blocks.ctypes.data, 0, *padded.shape, address)
        return _there_and_back(blocks, Q.Q4_K)[:, :columns]

    def blind(weight: Tensor, _: Tensor | None) -> Tensor:
        return q4_k(weight, None)

    return {"Q4_K": (blind, 4.5), "Q4_K with importance": (q4_k, 4.5)}


def _there_and_back(blocks: np.ndarray, kind: Q) -> Tensor:
    return torch.from_numpy(gguf.dequantize(blocks, kind))


@torch.no_grad()
def save_off_grid(path: Path, out: Path) -> None:
    """Save the model in the folder `path`, which has Llama's architecture, as float32 in the new folder
    `out`."""
    shutil.copytree(path, out, ignore=shutil.ignore_patterns("*.safetensors", "*.gguf", "*.index.json"))
    model = load_weights(path, dtype=torch.float32, device=torch.device("cpu"), kernels=REFERENCE)
    tensors, config = model.checkpoint_tensors(), model.config
    generator = torch.Generator().manual_seed(5)

    def move(feeding: str, fed: list[str], *, part: int | None = None, repeats: int = 1) -> None:
        """Scale the outputs of `feeding`, and inversely the inputs of `fed`, where each `part` is repeated
        `repeats` times."""
        outputs = tensors[f"{feeding}.weight"]
        factors = 2 ** (torch.rand(len(outputs), generator=generator) - 0.5)
        outputs.div_(factors.view(-1, *[1] * (outputs.dim() - 1)))
        parts = factors.view(-1, 1, part or len(outputs))
        for name in fed:
            tensors[f"{name}.weight"].mul_(parts.expand(-1, repeats, -1).flatten())

    for index in range(config.num_layers):
        layer = f"model.layers.{index}"
        attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
        move(f"{layer}.input_layernorm", [f"{attention}.{name}_proj" for name in "qkv"])
        queries_a_value = config.num_heads // config.num_kv_heads
        move(f"{attention}.v_proj", [f"{attention}.o_proj"], part=config.head_dim, repeats=queries_a_value)
        move(f"{layer}.post_attention_layernorm", [f"{mlp}.{name}_proj" for name in ("gate", "up")])
        move(f"{mlp}.up_proj", [f"{mlp}.down_proj"])
    saved = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(saved, out / "model.safetensors", metadata={"format": "pt"})
