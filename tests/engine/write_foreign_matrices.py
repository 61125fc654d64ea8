"""Writes tests/engine/foreign_matrices.safetensors: one matrix as the tools of others pack it, and what they
themselves make of that again. Needs them, which the tests do not:

    pip install --no-deps --target SITE compressed-tensors==0.20.1 loguru psutil
    pip download --no-deps --no-binary :all: autoawq==0.2.9 gptqmodel==7.7.0   # and unpack both
    PYTHONPATH=.:SITE python -m tests.engine.write_foreign_matrices AUTOAWQ_FOLDER GPTQMODEL_FOLDER

Of the last two only the functions that pack and unpack are taken, out of the source: the packages would be
hundreds of megabytes.
"""

import ast
import math
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from safetensors.torch import save_file
from torch import Tensor

from tests.engine.foreign import COMPRESSED, FILE, GROUP, SHAPE

ROWS, COLUMNS = SHAPE


def weight() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * 0.15


def int4(group: int, zeros: bool) -> tuple[Tensor, Tensor]:
    """Scales in float16 and whole zeros [rows, groups] of `weight`."""
    groups = weight().view(ROWS, -1, group)
    low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
    if not zeros:
        scales = (groups.abs().amax(2) / 7).half()
        return scales, torch.full(scales.shape, 8.0)
    scales = ((high - low) / 15).half()
    return scales, (-low / scales.float()).round().clamp(1, 15)


def function(file: Path, name: str, owner: str | None = None, **names: object):
    """Out of a source file, without importing what it imports."""
    body = ast.parse(file.read_text()).body
    if owner is not None:
        body = next(node for node in body if isinstance(node, ast.ClassDef) and node.name == owner).body
    found = next(node for node in body if isinstance(node, ast.FunctionDef) and node.name == name)
    found.decorator_list, found.returns = [], None
    for argument in (*found.args.args, *found.args.kwonlyargs):
        argument.annotation = None
    exec(compile(ast.Module([found], []), str(file), "exec"), names)
    return names[name]


def awq(folder: Path) -> dict[str, Tensor]:
    scales, zeros = int4(GROUP, zeros=True)
    linear = torch.nn.Linear(COLUMNS, ROWS, bias=False)
    linear.weight.data = weight()

    from_linear = function(
        folder / "awq/modules/linear/gemm.py", "from_linear", "WQLinear_GEMM", torch=torch,
        get_best_device=lambda: "cpu",
    )  # fmt: skip
    empty = SimpleNamespace(w_bit=4, group_size=GROUP, in_features=COLUMNS, out_features=ROWS)
    packed = from_linear(
        lambda *arguments: empty,
        linear,
        4,
        GROUP,
        scales=scales.t().contiguous(),
        zeros=zeros.t().contiguous(),
    )
    packing = folder / "awq/utils/packing_utils.py"
    orders = {"AWQ_REVERSE_ORDER": [0, 4, 1, 5, 2, 6, 3, 7], "torch": torch}
    parts = {name: function(packing, name, **orders) for name in ("unpack_awq", "reverse_awq_order")}
    dequantize = function(packing, "dequantize_gemm", **orders, **parts)
    tensors = {"qweight": packed.qweight, "qzeros": packed.qzeros, "scales": packed.scales}
    dense = dequantize(packed.qweight, packed.qzeros, packed.scales.float(), 4, GROUP).t()
    return tensors | {"dense": dense}


def gptq(folder: Path, *, desc_act: bool, second: bool) -> dict[str, Tensor]:
    file = folder / "gptqmodel/nn_modules/qlinear/__init__.py"
    scales, zeros = int4(GROUP, zeros=True)
    groups = torch.arange(COLUMNS, dtype=torch.int32) // GROUP
    if desc_act:
        groups = groups[torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(1))]
    buffers: dict[str, Tensor] = {}

    def register_buffer(name: str, value: Tensor) -> None:
        buffers[name] = value
        setattr(module, name, value)

    module = SimpleNamespace(
        register_buffer=register_buffer, bits=4, maxq=15, pack_dtype_bits=32, pack_factor=8, planar=False,
        pack_np_math_dtype=np.uint32, pack_np_dtype=np.int32, in_features=COLUMNS, dequant_dtype=torch.int8,
    )  # fmt: skip
    one_thread = SimpleNamespace(threadpool_limits=lambda count: nullcontext())
    names = {
        "t": torch, "nn": torch.nn, "np": np, "math": math, "THREADPOOLCTL": one_thread, "_ConvNd": (),
        "transformers": SimpleNamespace(pytorch_utils=SimpleNamespace(Conv1D=())),
        "log": SimpleNamespace(info=SimpleNamespace(once=print)),
    }  # fmt: skip
    linear = SimpleNamespace(weight=torch.nn.Parameter(weight(), requires_grad=False), bias=None)
    function(file, "pack_original", "PackableQuantLinear", **names)(module, linear, scales, zeros, groups)
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    module._init_wf_unsqueeze_buffers = lambda: None
    module.wf_unsqueeze_zero, module.wf_unsqueeze_neg_one = shifts.view(1, 1, 8), shifts.view(1, 8, 1)
    module.scales = module.scales.float()
    names |= {"_torch_right_shift": torch.bitwise_right_shift}
    codes = function(file, "_dequantize_from_codes", "PackableQuantLinear", **names)
    module._dequantize_from_codes = lambda *args, **kwargs: codes(module, *args, **kwargs)
    dense = function(file, "dequantize_weight", "PackableQuantLinear", **names)(module).t()
    if not second:  # as convert_gptq_v2_to_v1_format_module has it
        buffers["qzeros"] = buffers["qzeros"] - 0x11111111
    return buffers | {"scales": scales.t(), "dense": dense}


def compressed(arguments: dict, layout: str) -> dict[str, Tensor]:
    scheme = QuantizationScheme(targets=["Linear"], **arguments)
    args = scheme.weights
    rows, columns = {
        "tensor": (ROWS, COLUMNS), "channel": (1, COLUMNS), "group": (1, args.group_size),
        "block": args.block_structure,
    }[args.strategy]  # fmt: skip
    blocks = weight().view(ROWS // rows, rows, COLUMNS // columns, columns).transpose(1, 2).flatten(2)
    largest = 448 if args.type == "float" else 2 ** (args.num_bits - 1) - 1
    scales = (blocks.abs().amax(2) / largest).to(torch.bfloat16)
    zeros = torch.zeros(scales.shape, dtype=torch.int8 if args.type == "int" else torch.float8_e4m3fn)
    if not args.symmetric:
        low, high = blocks.amin(2), blocks.amax(2)
        scales = ((high - low) / 15).to(torch.bfloat16)
        zeros = (-8 - low / scales.float()).round().clamp(-8, 7).to(torch.int8)
    if args.strategy == "tensor":
        scales, zeros = scales.view(1), zeros.view(1)
    state = {"weight": weight(), "weight_scale": scales, "weight_zero_point": zeros}
    compressor = BaseCompressor.get_value_from_registry(layout)
    packed = compressor.compress(state, scheme)
    exact = packed | {"weight_scale": packed["weight_scale"].float()}
    if "weight_zero_point" in packed:
        exact["weight_zero_point"] = packed["weight_zero_point"]
    return packed | {"dense": compressor.decompress(exact, scheme)["weight"].float()}


def main(autoawq: str, gptqmodel: str) -> None:
    matrices = {"awq": awq(Path(autoawq))}
    for name, desc_act, second in (
        ("gptq", False, False),
        ("gptq_v2", False, True),
        ("gptq-desc_act", True, False),
    ):
        matrices[name] = gptq(Path(gptqmodel), desc_act=desc_act, second=second)
    for name, (layout, arguments) in COMPRESSED.items():
        matrices[name] = compressed(arguments, layout)
    tensors = {
        f"{name}.{part}": tensor.contiguous()
        for name, parts in matrices.items()
        for part, tensor in parts.items()
    }
    save_file(tensors, FILE)


if __name__ == "__main__":
    main(*sys.argv[1:])
