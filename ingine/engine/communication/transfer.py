"""Copies between host and device that are enqueued behind the device's other work and not waited for."""

import numpy as np
import torch
from torch import Tensor


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Return `array` as a tensor on `device`. On CUDA the copy is only enqueued, from pinned memory that
    torch keeps until the copy is done. On a CPU the tensor shares the array's memory.
    """
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class HostCopy:
    """Copies of tensors to the host, in flight. A step of the engine waits for a GPU only in `wait`."""

    def __init__(self, *tensors: Tensor):
        """Enqueue the copies. On devices other than CUDA this waits for them."""
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
        """Wait for the copies and return them, in the order in which the tensors were given."""
        if self._event is not None:
            self._event.synchronize()
        return self._copies


class Staging:
    """Tensors at fixed addresses in one piece of device memory, which one copy fills."""

    def __init__(self, arrays: list[np.ndarray], device: torch.device):
        """Make one tensor for each of `arrays`, with its shape, dtype and contents. `arrays` have to be in
        the order of their item sizes, largest first, so that each tensor is aligned.
        """
        self._device = device
        self._memory = torch.empty(sum(array.nbytes for array in arrays), dtype=torch.uint8, device=device)
        self.tensors = _cut(self._memory, arrays)
        self.fill(arrays)

    def fill(self, arrays: list[np.ndarray]) -> None:
        """Enqueue a copy of `arrays`, whose shapes and dtypes are those given to the constructor."""
        host = torch.empty(self._memory.shape, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        for tensor, array in zip(_cut(host, arrays), arrays, strict=True):
            tensor.numpy()[:] = array
        self._memory.copy_(host, non_blocking=True)


def _cut(memory: Tensor, arrays: list[np.ndarray]) -> list[Tensor]:
    """Views of consecutive parts of `memory`, with the shapes and dtypes of `arrays`."""
    parts = memory.split([array.nbytes for array in arrays])
    return [
        part.view(torch.from_numpy(array).dtype).view(array.shape)
        for part, array in zip(parts, arrays, strict=True)
    ]
