"""A test double for a CUDA graph, on the CPU: what is captured runs again, on what its tensors hold by then.

As with a graph, nothing is decided anew in a replay. Python does not run: numbers, shapes and branches are
those of the capture, and so is what comes from numpy (CUDA would read host memory that has another use by
then). Inputs change by being written into the tensors that were read. What waits for the device is refused.

Seen are torch's operations, and Triton kernels under its interpreter. Not seen is what goes past both: the
native kernels, and numpy on a tensor's memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

WAITING_FUNCTIONS = {Tensor.cpu, Tensor.numpy, Tensor.tolist, Tensor.__array__, torch.tensor}
"""Functions that wait, which the dispatcher cannot detect if the device is the CPU. torch.tensor copies from
pageable memory, which waits too."""

WAITING_OPERATIONS = {
    *("_local_scalar_dense", "is_nonzero", "equal", "allclose", "nonzero", "masked_select", "bincount"),
    *("_unique", "_unique2", "unique_dim", "unique_consecutive", "repeat_interleave"),
}
"""The host learns from these a value, or the shape of the result."""


class Tape:
    """`capture(fn)`, then `replay()` any number of times. `result` is what fn returned; a replay writes into
    its tensors."""

    def __init__(self):
        self.result: object = None
        self._calls: list[Callable[[], None]] = []

    @classmethod
    def capture(cls, fn: Callable[[], object]) -> Tape:
        """Runs fn once. Raises RuntimeError where it waits for the device."""
        tape = cls()
        with _triton_launches_to(tape._calls), _RefuseWaiting(), _Recorder(tape._calls):
            tape.result = fn()
        return tape

    def replay(self) -> None:
        with torch.inference_mode():  # which may write into tensors of either kind
            for call in self._calls:
                call()


class _RefuseWaiting(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in WAITING_FUNCTIONS:
            _refuse(func.__name__)
        return func(*args, **(kwargs or {}))


class _Recorder(TorchDispatchMode):
    def __init__(self, calls: list[Callable[[], None]]):
        super().__init__()
        self._calls = calls

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with self:  # under inference mode compositions come whole: look at what they are made of
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        name = func._schema.name.removeprefix("aten::")
        if name in WAITING_OPERATIONS and kwargs.get("output_size") is None:
            _refuse(name)
        if name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        ):
            _refuse(f"{name} by a mask")
        result = func(*args, **kwargs)
        inputs = {_memory(tensor) for tensor in _tensors((args, kwargs))}
        is_view = all(_memory(tensor) in inputs for tensor in _tensors(result))
        if func._schema.is_mutable or not is_view:  # a view is right by itself
            self._calls.append(partial(_run_again, func, args, kwargs, result))
        return result


def _run_again(func: Callable, args: tuple, kwargs: dict, recorded: object) -> None:
    """Puts the result where the operations that follow look for it."""
    result = func(*args, **kwargs)
    for old, new in zip(_tensors(recorded), _tensors(result), strict=True):
        if _memory(old) != _memory(new):
            old.copy_(new)


@contextmanager
def _triton_launches_to(calls: list[Callable[[], None]]) -> Iterator[None]:
    """Launches of kernels under the interpreter, which no dispatcher sees, go to `calls` too."""
    try:
        from triton.runtime.interpreter import InterpretedFunction
    except ImportError:  # triton is for Linux
        yield
        return
    launch = InterpretedFunction.run

    def record(self, *args, **kwargs):
        calls.append(partial(launch, self, *args, **kwargs))
        with torch._C.DisableTorchFunction(), _disable_current_modes():
            launch(self, *args, **kwargs)

    InterpretedFunction.run = record
    try:
        yield
    finally:
        InterpretedFunction.run = launch


def _refuse(name: str) -> None:
    raise RuntimeError(f"{name} waits for the device, in a capture")


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
