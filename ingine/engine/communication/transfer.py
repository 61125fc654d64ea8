"""Between host and device without waiting: copies are put in line behind what the device has to do."""

import numpy as np
import torch
from torch import Tensor


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """`array` as a tensor on `device`. On CUDA the copy is only put in line, from pinned memory that torch
    keeps until it is done; on a CPU the tensor shares the array's memory.
    """
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class HostCopy:
    """Tensors on their way to the host. A step of the engine waits for a GPU in `wait`, and nowhere else."""

    def __init__(self, *tensors: Tensor):
        """Puts the copies in line; on other devices than CUDA this waits for them."""
        self._event = None
        if tensors[0].device.type != "cuda":
            # A copy on a CPU too: the next step may write to the same memory before these are read.
            self._copies = [tensor.to("cpu", copy=True) for tensor in tensors]
            return
        self._copies = [
            torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
            for tensor in tensors
        ]
        self._event = torch.cuda.Event()
        self._event.record()

    def wait(self) -> list[Tensor]:
        """On the host, in the order that they were given in."""
        if self._event is not None:
            self._event.synchronize()
        return self._copies


class Staging:
    """Tensors that stay where they are, in one piece of memory on the device, filled by one copy."""

    def __init__(self, arrays: list[np.ndarray], device: torch.device):
        """Like `arrays` in number, shapes and dtypes, those of wide items first, and filled with them."""
        self._device = device
        self._memory = torch.empty(sum(array.nbytes for array in arrays), dtype=torch.uint8, device=device)
        self.tensors = _cut(self._memory, arrays)
        self.fill(arrays)

    def fill(self, arrays: list[np.ndarray]) -> None:
        """As given when it was made, with other contents. Only puts the copy in line."""
        host = torch.empty(self._memory.shape, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        for tensor, array in zip(_cut(host, arrays), arrays, strict=True):
            tensor.numpy()[:] = array
        self._memory.copy_(host, non_blocking=True)


def _cut(memory: Tensor, arrays: list[np.ndarray]) -> list[Tensor]:
    """Parts of `memory` that are like `arrays`."""
    parts = memory.split([array.nbytes for array in arrays])
    return [
        part.view(torch.from_numpy(array).dtype).view(array.shape)
        for part, array in zip(parts, arrays, strict=True)
    ]
