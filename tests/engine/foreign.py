"""Common parts of the tests of checkpoints that other programs quantised."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

FILE = Path(__file__).with_name("foreign_matrices.safetensors")
"""Written by `write_foreign_matrices.py`: `<name>.<tensor>`, and `<name>.dense` in float32, from the same
code."""

SHAPE = (32, 64)
GROUP = 32


def _weights(num_bits: int, kind: str, strategy: str, **more: Any) -> dict[str, Any]:
    return {"weights": {"num_bits": num_bits, "type": kind, "strategy": strategy, "symmetric": True} | more}


_INT8_TOKENS = {
    "input_activations": {
        "num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True,
    }
}  # fmt: skip

COMPRESSED: dict[str, tuple[str, dict[str, Any]]] = {
    "w4a16": ("pack-quantized", _weights(4, "int", "group", group_size=GROUP)),
    "w4a16-asym": ("pack-quantized", _weights(4, "int", "group", group_size=GROUP, symmetric=False)),
    "w4a16-channel": ("pack-quantized", _weights(4, "int", "channel")),
    "w4a16-channel-asym": ("pack-quantized", _weights(4, "int", "channel", symmetric=False)),
    "w8a16": ("pack-quantized", _weights(8, "int", "group", group_size=GROUP)),
    "w8a8": ("int-quantized", _weights(8, "int", "channel") | _INT8_TOKENS),
    "fp8": ("float-quantized", _weights(8, "float", "tensor")),
    "fp8-channel": ("float-quantized", _weights(8, "float", "channel")),
    "fp8-block": ("float-quantized", _weights(8, "float", "block", block_structure=[16, 32])),
}
"""Name -> the format and the arguments of a group of `config_groups`."""

_INT4 = {"bits": 4, "group_size": GROUP}

MATRICES: dict[str, dict[str, Any]] = {
    "awq": {"quant_method": "awq", "zero_point": True, "version": "gemm", **_INT4},
    "gptq": {"quant_method": "gptq", "checkpoint_format": "gptq", "desc_act": False, "sym": False, **_INT4},
    "gptq_v2": {"quant_method": "gptq", "checkpoint_format": "gptq_v2", "desc_act": False, **_INT4},
    "gptq-desc_act": {"quant_method": "gptq", "desc_act": True, **_INT4},
} | {
    name: {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], **arguments}},
    }
    for name, (layout, arguments) in COMPRESSED.items()
}
"""Name -> the `quantization_config` of a checkpoint with such matrices."""

DEEPSEEK = {
    "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [16, 32],
}  # fmt: skip

CHECKPOINTS = MATRICES | {"deepseek": DEEPSEEK}


def pack(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of a module of a checkpoint `name`, for `weight` [rows, columns], rounded; and what they
    say, float32. That `pack_int4` has the formats right is tested with what was packed by others.
    """
    rows, columns = weight.shape
    if name in ("awq", "gptq", "gptq_v2", "gptq-desc_act") or name.startswith("w4a16"):
        group = columns if "channel" in name else GROUP
        order = torch.arange(columns)
        if "desc_act" in name:
            order = torch.randperm(columns, generator=torch.Generator().manual_seed(2))
        groups = weight[:, order].view(rows, -1, group)
        symmetric = name in ("w4a16", "w4a16-channel")
        low, high = groups.amin(2).clamp(max=-1e-6), groups.amax(2).clamp(min=1e-6)
        scales = ((groups.abs().amax(2) / 7) if symmetric else (high - low) / 15).bfloat16()
        zeros = torch.full(scales.shape, 8) if symmetric else (-low / scales).round().clamp(1, 15).int()
        codes = (groups / scales[..., None] + zeros[..., None]).round().clamp(0, 15).to(torch.uint8)
        dense = torch.empty_like(weight)
        dense[:, order] = ((codes.float() - zeros[..., None]) * scales.float()[..., None]).view(weight.shape)
        return pack_int4(name, codes.view(weight.shape), scales, zeros, order), dense
    block = {"w8a16": (1, GROUP), "w8a8": (1, columns), "fp8": weight.shape, "fp8-channel": (1, columns)}
    height, width = block.get(name, (16, 32))
    blocks = weight.view(rows // height, height, columns // width, width)
    scales = blocks.abs().amax(dim=(1, 3)) / (127 if "w8" in name else 448)
    scales = scales.float() if name == "deepseek" else scales.bfloat16()
    scaled = blocks / scales.float()[:, None, :, None]
    numbers = (
        scaled.round().clamp(-128, 127).to(torch.int8) if "w8" in name else scaled.to(torch.float8_e4m3fn)
    )
    dense = (numbers.float() * scales.float()[:, None, :, None]).view(weight.shape)
    numbers = numbers.view(weight.shape)
    if name == "w8a16":
        words = (numbers.view(torch.uint8) ^ 0x80).view(torch.int32)
        return {
            "weight_packed": words,
            "weight_scale": scales,
            "weight_shape": torch.tensor(weight.shape),
        }, dense
    scale = "weight_scale_inv" if name == "deepseek" else "weight_scale"
    return {"weight": numbers, scale: scales.view(1) if name == "fp8" else scales}, dense


def pack_int4(
    name: str, codes: Tensor, scales: Tensor, zeros: Tensor, order: Tensor | None = None
) -> dict[str, Tensor]:
    """codes [rows, columns], and scales and zeros [rows, groups], their groups one after the other; column i
    of `codes` is column order[i] of the matrix."""
    columns = codes.shape[1]
    if name == "awq":
        places = [0, 2, 4, 6, 1, 3, 5, 7]  # the column of each place of a word
        qweight, qzeros = (_words(one.t().unflatten(1, (-1, 8))[..., places]) for one in (codes, zeros))
        return {"qweight": qweight, "qzeros": qzeros, "scales": scales.t().half().contiguous()}
    if name.startswith("gptq"):
        qweight, qzeros = _words(_last_by_8(codes, order)).t(), _words(zeros.t().unflatten(1, (-1, 8)))
        groups = torch.empty(columns, dtype=torch.int32)
        groups[slice(None) if order is None else order] = torch.arange(columns, dtype=torch.int32) // (
            columns // scales.shape[1]
        )
        return {
            "qweight": qweight.contiguous(),
            "qzeros": qzeros if name == "gptq_v2" else qzeros - 0x11111111,
            "scales": scales.t().half().contiguous(),
            "g_idx": groups,
        }
    packed = {
        "weight_packed": _words(_last_by_8(codes, order)),
        "weight_scale": scales.bfloat16(),
        "weight_shape": torch.tensor(codes.shape),
    }
    if name.endswith("asym"):
        packed["weight_zero_point"] = _words(zeros.t().unflatten(1, (-1, 8))).t().contiguous()
    return packed


def _last_by_8(codes: Tensor, order: Tensor | None) -> Tensor:
    """[rows, columns / 8, 8], the columns in the order of the matrix."""
    return (codes if order is None else codes[:, order.argsort()]).unflatten(1, (-1, 8))


def _words(places: Tensor) -> Tensor:
    """[rows, words, 8], numbers of four bits -> int32 [rows, words], the first in the lowest bits."""
    return (places.long() << torch.arange(0, 32, 4)).sum(2).to(torch.int32)


def quantize_model(path: Path, name: str, dense_path: Path) -> None:
    """Make of the tiny model in `path` a checkpoint `name`; `dense_path`: the same with plain weights."""
    config, tensors, dense = json.loads((path / "config.json").read_text()), {}, {}
    shutil.copytree(path, dense_path)
    for key, weight in load_file(path / "model.safetensors").items():
        tensors[key] = dense[key] = weight
        if "_proj.weight" in key:
            del tensors[key]
            parts, dense[key] = pack(name, weight.float())
            tensors |= {f"{key.removesuffix('.weight')}.{part}": one for part, one in parts.items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    save_file(dense, dense_path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": CHECKPOINTS[name]}))
