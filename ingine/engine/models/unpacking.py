"""Converts the tensors of a quantised module, as other tools pack them, to a StoredMatrix.

Shapes and types have been checked before (`quantized_modules.py`). Impossible values raise ValueError.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ingine.engine.kernels.layers.stored import Int4Matrix, ReorderedMatrix, ScaledMatrix, StoredMatrix
from ingine.engine.models.quantization import Scheme

Unpack = Callable[[tuple[int, int], Scheme, dict[str, Tensor], bool], StoredMatrix]
"""Maps (shape, scheme, the module's tensors, whether stored zeros are one too small) to the matrix."""

_AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]
"""The place in a word, of eight (place 0 has the lowest bits), where AutoAWQ puts columns 0 to 7."""

_ONE_IN_EACH_PLACE = 0x11111111


def unpack_awq(
    shape: tuple[int, int], scheme: Scheme, tensors: dict[str, Tensor], zeros_less_one: bool
) -> Int4Matrix:
    """Unpack AutoAWQ's tensors. A word holds eight outputs of one input."""
    codes, zeros = (_places(tensors[name])[..., _AWQ_ORDER].flatten(1) for name in ("qweight", "qzeros"))
    return Int4Matrix(shape, _pairs(codes.t()), *_float16(tensors["scales"].t(), zeros.t()))


def unpack_gptq(
    shape: tuple[int, int], scheme: Scheme, tensors: dict[str, Tensor], zeros_less_one: bool
) -> Int4Matrix | ReorderedMatrix:
    """Unpack GPTQ's tensors. A word holds eight inputs of one output; a word of zeros, eight outputs."""
    zeros = tensors["qzeros"]
    if zeros_less_one:
        # Add to the whole word, with carries, since GPTQModel subtracts from the whole word.
        zeros = zeros + _ONE_IN_EACH_PLACE
    matrix = Int4Matrix(
        shape,
        _bytes(tensors["qweight"].t().contiguous()),
        *_float16(tensors["scales"].t(), _places(zeros).flatten(1).t()),
    )
    return _in_order_of(tensors.get("g_idx"), matrix)


def unpack_packed(
    shape: tuple[int, int], scheme: Scheme, tensors: dict[str, Tensor], zeros_less_one: bool
) -> StoredMatrix:
    """Unpack compressed-tensors. A word has four or eight inputs of one output, plus half of their range."""
    if tensors["weight_shape"].tolist() != list(shape):
        raise ValueError(f"its weight_shape is {tensors['weight_shape'].tolist()}, not {list(shape)}")
    scales = tensors["weight_scale"]
    if scheme.kind == "int8":
        if not _is_unset(tensors.get("weight_g_idx")):
            raise ValueError("int8 numbers with a weight_g_idx are not supported")
        numbers = (_bytes(tensors["weight_packed"]) ^ 0x80).view(torch.int8)
        return _scaled(shape, scheme, numbers, scales)
    rows = shape[0]
    scales = (scales if scales.dim() == 2 else scales.view(-1, 1)).expand(rows, -1)
    zeros = torch.full(scales.shape, 8)
    if (packed := tensors.get("weight_zero_point")) is not None:  # a word holds eight outputs of one group
        zeros = _places(packed.t().contiguous()).flatten(1).t()[:rows]
    matrix = Int4Matrix(shape, _bytes(tensors["weight_packed"]), *_float16(scales, zeros))
    groups = tensors.get("weight_g_idx")
    return matrix if _is_unset(groups) else _in_order_of(groups, matrix)


def unpack_scaled(
    shape: tuple[int, int], scheme: Scheme, tensors: dict[str, Tensor], zeros_less_one: bool
) -> ScaledMatrix:
    return _scaled(shape, scheme, tensors["weight"], tensors["scale"])


def _scaled(shape: tuple[int, int], scheme: Scheme, numbers: Tensor, scales: Tensor) -> ScaledMatrix:
    (n, k), block = shape, (scheme.rows, scheme.columns)
    scales = scales.float().reshape(-(-n // block[0]), -(-k // block[1]))
    if not scales.isfinite().all():
        raise ValueError("a scale is not finite")
    return ScaledMatrix(shape, numbers, scales, block, scheme.int8_activations)


def _is_unset(groups: Tensor | None) -> bool:
    """Return whether `weight_g_idx` is missing or was never set: compressed-tensors fills it with -1, and
    columns are then in order.
    """
    return groups is None or bool((groups == -1).all())


def _in_order_of(groups: Tensor | None, matrix: Int4Matrix) -> Int4Matrix | ReorderedMatrix:
    """Return `matrix`, whose columns are as stored, with the columns of a group side by side.

    groups: the group of each column; None: groups are in order. The columns of a group need not be neighbours
    ("desc_act"), but all groups have the same size.
    """
    columns, num_groups = matrix.shape[1], matrix.scales.shape[1]
    in_order = torch.arange(columns) // matrix.group_size
    if groups is None or torch.equal(groups.long(), in_order):
        return matrix
    if not torch.equal(groups.long().sort().values, in_order):
        raise ValueError(f"its g_idx does not have {num_groups} groups of {matrix.group_size} columns")
    order = groups.argsort(stable=True)
    codes = torch.stack((matrix.codes & 15, matrix.codes >> 4), dim=2).flatten(1)
    return ReorderedMatrix(
        Int4Matrix(matrix.shape, _pairs(codes[:, order]), matrix.scales, matrix.zeros), order
    )


def _bytes(words: Tensor) -> Tensor:
    """Convert int32 [rows, columns] to uint8 [rows, 4 * columns], the lowest byte first, on any machine."""
    if torch.tensor([1], dtype=torch.int32).view(torch.uint8)[0] == 0:
        words = torch.from_numpy(words.numpy().byteswap())
    return words.contiguous().view(torch.uint8)


def _places(words: Tensor) -> Tensor:
    """Convert int32 [rows, columns] to uint8 [rows, columns, 8]: four bits each, the lowest first."""
    packed = _bytes(words).unflatten(1, (-1, 4))
    return torch.stack((packed & 15, packed >> 4), dim=3).flatten(2)


def _pairs(codes: Tensor) -> Tensor:
    """Pack codes [rows, columns] to [rows, columns / 2]: even columns are the low four bits."""
    return codes[:, 0::2] | codes[:, 1::2] << 4


def _float16(scales: Tensor, zeros: Tensor) -> tuple[Tensor, Tensor]:
    """Return contiguous scales and zeros of an Int4Matrix. Raises ValueError for scales that do not fit
    float16, which no tool writes.
    """
    rounded = scales.half()
    error = (rounded.float() - scales.float()).abs()
    if not rounded.isfinite().all() or (error > scales.float().abs().amax() * 2**-11).any():
        raise ValueError(f"its scales ({scales.abs().amax().item():.3g} at most) do not fit into float16")
    return rounded.contiguous(), zeros.half().contiguous()
