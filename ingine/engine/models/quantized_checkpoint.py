"""A checkpoint of safetensors whose linear layers another tool has quantised: see `quantization.py`."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ingine.engine.kernels.layers.stored import StoredMatrix
from ingine.engine.models.checkpoint import EMBEDDING, HEAD, SafetensorsCheckpoint
from ingine.engine.models.quantization import Quantization
from ingine.engine.models.quantized_modules import find_quantized_modules


class QuantizedCheckpoint(SafetensorsCheckpoint):
    """Safetensors in which each quantised module appears as one tensor, its weight."""

    def __init__(self, folder: Path, quantization: Quantization, expected: Mapping[str, list[int]]):
        """Read the files' headers. `expected` has the shapes of the tensors of such a model.

        Raises ConfigError (or its UnsupportedModel) that names the tensor at fault.
        """
        headers = self._read_headers(folder)
        self._modules = find_quantized_modules(quantization, headers, expected)
        packed = {name for module in self._modules.values() for name in module.names()}
        self.shape_of = self._plain_shapes(
            {name: tensor for name, tensor in headers.items() if name not in packed}
        )
        for name, module in self._modules.items():
            self.shape_of[name] = list(module.shape)
            self.file_of.setdefault(name, self.file_of[next(iter(module.tensors.values()))])

    def read(self, name: str, *part: slice) -> Tensor:
        matrix = self.matrix(name)
        return super().read(name, *part) if matrix is None else matrix.dense()[part or slice(None)]

    def matrix(self, name: str) -> StoredMatrix | None:
        module = self._modules.get(name)
        return None if module is None else module.read(super().read)

    def has_a_head_of_its_own(self) -> bool:
        if not {EMBEDDING, HEAD} & self._modules.keys():
            return super().has_a_head_of_its_own()
        return {EMBEDDING, HEAD} <= self.shape_of.keys()  # not compared: two equal matrices are correct too
