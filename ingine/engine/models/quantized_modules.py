"""Finds the quantised weights of each module in a checkpoint, and reads them as a StoredMatrix.

The tensors of a module, by the tool that wrote them; `n` is out_features, `k` in_features, `g` the number of
groups:

    AutoAWQ             qweight i32 [k, n/8], qzeros i32 [g, n/8], scales [g, n]
    GPTQ                qweight i32 [k/8, n], qzeros i32 [g, n/8], scales [g, n], g_idx i32 [k]
    compressed-tensors  weight_packed i32 [n, k/8 or k/4], weight_scale [n, g], weight_shape i64 [2]; if
                        asymmetric, weight_zero_point i32 [n/8, g]; weight_g_idx i32 [k], in older files
    the same, and fp8   weight i8 or f8 [n, k], weight_scale (weight_scale_inv) by row, by block, or one

Shapes and types are checked in the files' headers, before any tensor is read.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from ingine.engine.files.safetensors_header import StoredTensor
from ingine.engine.kernels.layers.stored import StoredMatrix
from ingine.engine.models.quantization import Quantization, Scheme
from ingine.engine.models.unpacking import Unpack, unpack_awq, unpack_gptq, unpack_packed, unpack_scaled
from ingine.errors import ConfigError, UnsupportedModel

_FLOATS = ("F32", "F16", "BF16")
_INTEGERS = ("I32", "I64")
_IGNORED = ("input_scale", "input_zero_point", "activation_scale")
"""Tensors for kernels that quantise activations with a scale of the checkpoint. The kernels here do not."""

Headers = Mapping[str, StoredTensor]
Read = Callable[[str], Tensor]


@dataclass(frozen=True, slots=True)
class QuantizedModule:
    name: str
    shape: tuple[int, int]
    scheme: Scheme
    """Its rows and columns are not None, and at most those of `shape`."""
    tensors: dict[str, str]
    """The names of its tensors by their last part, such as `qweight`."""
    unpack: Unpack
    zeros_less_one: bool
    ignored: tuple[str, ...] = ()
    zero_bias: str | None = None
    """A bias that such a model does not have, and that must be zero: AutoGPTQ adds one to every module."""

    def read(self, read: Read) -> StoredMatrix:
        """Read the weight. Raises ConfigError that names the module."""
        try:
            if self.zero_bias is not None and read(self.zero_bias).any():
                raise ValueError("its bias is not zero, and this architecture has none")
            tensors = {part: read(name) for part, name in self.tensors.items()}
            return self.unpack(self.shape, self.scheme, tensors, self.zeros_less_one)
        except ValueError as error:
            raise ConfigError(f"{self.name}: {error}") from error

    def names(self) -> set[str]:
        """Return the names of all tensors of the checkpoint that belong to the module."""
        bias = () if self.zero_bias is None else (self.zero_bias,)
        return {*self.tensors.values(), *self.ignored, *bias}


def find_quantized_modules(
    quantization: Quantization, headers: Headers, expected: Mapping[str, list[int]]
) -> dict[str, QuantizedModule]:
    """Return the quantised modules by the names of their weights, of `expected` names and shapes.

    Raises ConfigError (or its UnsupportedModel) that names the tensor at fault.
    """
    found = {}
    for name, shape in expected.items():
        if name.endswith(".weight") and len(shape) == 2:
            module = _find(
                quantization, name.removesuffix(".weight"), (shape[0], shape[1]), headers, expected
            )
            if module is not None:
                found[name] = module
    return found


def _find(
    quantization: Quantization,
    module: str,
    shape: tuple[int, int],
    headers: Headers,
    expected: Mapping[str, list[int]],
) -> QuantizedModule | None:
    def header(part: str) -> StoredTensor | None:
        return headers.get(f"{module}.{part}")

    weight = header("weight")
    match quantization.method:
        case "awq" if header("qweight"):
            layout = _Layout(module, shape, headers).awq(quantization.schemes)
        case "gptq" if header("qweight"):
            layout = _Layout(module, shape, headers).gptq(quantization.schemes, quantization.desc_act)
        case "compressed-tensors" if header("weight_packed"):
            layout = _Layout(module, shape, headers).packed(quantization.schemes)
        case "compressed-tensors" | "fp8" if weight is not None and weight.dtype in ("I8", "F8_E4M3"):
            layout = _Layout(module, shape, headers).scaled(quantization.schemes, weight.dtype)
        case _:
            return None
    scheme, tensors, unpack = layout
    if weight is not None and "weight" not in tensors:
        raise ConfigError(f"{module}.weight is there, and the same module's quantised tensors too")
    bias = f"{module}.bias"
    has_spare_bias = bias in headers and bias not in expected
    if has_spare_bias:
        _Layout(module, shape, headers).require("bias", _FLOATS, [shape[0]])
    return QuantizedModule(
        module,
        shape,
        scheme,
        tensors,
        unpack,
        quantization.zeros_less_one,
        tuple(f"{module}.{part}" for part in _IGNORED if header(part)),
        bias if has_spare_bias else None,
    )


_Found = tuple[Scheme, dict[str, str], Unpack]


@dataclass(frozen=True, slots=True)
class _Layout:
    """Checks the headers of one module."""

    module: str
    shape: tuple[int, int]
    headers: Headers

    def awq(self, schemes: tuple[Scheme, ...]) -> _Found:
        (n, k), scheme = self.shape, self._scheme("scales", "int4", schemes, transposed=True)
        words, groups = self._divided(n, 8, "out_features"), k // scheme.columns
        names = self.require("qweight", ("I32",), [k, words])
        names |= self.require("qzeros", ("I32",), [groups, words])
        return scheme, names | self.require("scales", _FLOATS, [groups, n]), unpack_awq

    def gptq(self, schemes: tuple[Scheme, ...], desc_act: bool) -> _Found:
        (n, k), scheme = self.shape, self._scheme("scales", "int4", schemes, transposed=True)
        groups = k // scheme.columns
        names = self.require("qweight", ("I32",), [self._divided(k, 8, "in_features"), n])
        names |= self.require("qzeros", ("I32",), [groups, self._divided(n, 8, "out_features")])
        names |= self.require("scales", _FLOATS, [groups, n])
        find = self.require if desc_act and groups > 1 else self._if_there
        return scheme, names | find("g_idx", ("I32",), [k]), unpack_gptq

    def packed(self, schemes: tuple[Scheme, ...]) -> _Found:
        n, k = self.shape
        kinds = {scheme.kind for scheme in schemes} - {"fp8"}
        if len(kinds) > 1:
            stored = self.headers[f"{self.module}.weight_packed"].shape
            kinds = {"int8" if list(stored) == [n, k // 4] else "int4"}
        kind = kinds.pop() if kinds else "int4"
        in_a_word = 4 if kind == "int8" else 8
        scheme = self._scheme("weight_scale", kind, schemes)
        names = self.require("weight_packed", ("I32",), [n, self._divided(k, in_a_word, "in_features")])
        names |= self.require("weight_shape", _INTEGERS, [2])
        names |= self.require("weight_scale", _FLOATS)
        if kind == "int4":
            grid = self.headers[f"{self.module}.weight_scale"].shape
            groups = grid[1] if len(grid) == 2 else 1
            find = self._if_there if scheme.symmetric else self.require
            names |= find("weight_zero_point", ("I32",), [-(-n // 8), groups])
        # `actorder` is not read: the tool leaves out a g_idx that was never set, and columns are then in
        # order.
        return scheme, names | self._if_there("weight_g_idx", ("I32",), [k]), unpack_packed

    def scaled(self, schemes: tuple[Scheme, ...], dtype: str) -> _Found:
        scale = "weight_scale_inv" if f"{self.module}.weight_scale_inv" in self.headers else "weight_scale"
        scheme = self._scheme(scale, "int8" if dtype == "I8" else "fp8", schemes)
        names = self.require("weight", (dtype,), list(self.shape))
        return scheme, names | {"scale": self.require(scale, _FLOATS)[scale]}, unpack_scaled

    def require(self, part: str, dtypes: tuple[str, ...], shape: list[int] | None = None) -> dict[str, str]:
        """Check that `part` has one of `dtypes` and, if given, `shape`. Returns {part: name of the
        tensor}.
        """
        name = f"{self.module}.{part}"
        tensor = self.headers.get(name)
        if tensor is None:
            raise ConfigError(f"weights are missing: {name}, of a module that is quantised")
        if tensor.dtype not in dtypes:
            raise UnsupportedModel(f"unsupported: {name} in {tensor.dtype} ({', '.join(dtypes)} works)")
        if shape is not None and list(tensor.shape) != shape:
            raise ConfigError(
                f"{name} is {list(tensor.shape)}, for a weight of {list(self.shape)} not {shape}"
            )
        return {part: name}

    def _if_there(self, part: str, dtypes: tuple[str, ...], shape: list[int]) -> dict[str, str]:
        return self.require(part, dtypes, shape) if f"{self.module}.{part}" in self.headers else {}

    def _divided(self, size: int, by: int, what: str) -> int:
        if size % by:
            raise UnsupportedModel(f"unsupported: {self.module} has {size} {what}, packed {by} in a word")
        return size // by

    def _scheme(
        self, part: str, kind: str, schemes: tuple[Scheme, ...], *, transposed: bool = False
    ) -> Scheme:
        """Return the only scheme whose scales have the shape of the tensor `part`."""
        name, (n, k) = self.require(part, _FLOATS)[part], self.shape
        stored = list(self.headers[name].shape)
        own = [self._clipped(scheme) for scheme in schemes if scheme.kind == kind]
        fits = {scheme for scheme in own if stored in self._scale_shapes(scheme, transposed)}
        if not fits:
            raise ConfigError(
                f"{name} is {stored}: config.json has no {kind} scheme with such scales for a weight of "
                f"{[n, k]}"
            )
        if len(fits) > 1:
            raise UnsupportedModel(f"unsupported: several schemes of config.json fit {name}")
        [scheme] = fits
        if kind == "int4" and (scheme.rows not in (1, n) or k % scheme.columns or scheme.columns % 2):
            raise UnsupportedModel(
                f"unsupported: {self.module} with {k} in_features in groups of {scheme.columns}; "
                "groups have to be even and whole"
            )
        return scheme

    def _clipped(self, scheme: Scheme) -> Scheme:
        n, k = self.shape
        return replace(scheme, rows=min(scheme.rows or n, n), columns=min(scheme.columns or k, k))

    def _scale_shapes(self, scheme: Scheme, transposed: bool) -> list[list[int]]:
        (n, k), rows, columns = self.shape, scheme.rows, scheme.columns
        grid = [-(-n // rows), -(-k // columns)]
        if transposed:
            return [grid[::-1]]
        return [grid, *([[grid[0]]] if grid[1] == 1 else []), *([[]] if grid == [1, 1] else [])]
