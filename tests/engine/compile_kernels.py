"""Compiles Triton kernels for GPUs on a machine that has none, down to machine code, and runs none.

    python -m tests.engine.compile_kernels CAPABILITY     80, 89 or 90

What the interpreter accepts is not all that the compiler does. Prints each kernel that was compiled, and the
shared memory that a program of it takes.
"""

import sys

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from ingine.attention.triton import TritonAttention
from tests.engine.paged_attention import Attention


class AbsentGPU:
    """As much of a driver as compiling asks for."""

    def __init__(self, capability: int):
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_instead_of_running(capability: int) -> None:
    driver.set_active(AbsentGPU(capability))
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        assert kernel.asm["cubin"]
        print(self.__name__, kernel.metadata.shared)
        return kernel

    JITFunction.run = compile_only


def compile_attention(capability: int) -> None:
    """A prefill and decodes: split ones, over quantised KV, and such that are not."""
    quantised = TritonAttention("fp8" if capability >= 89 else "int8")
    Attention(12, 2, 128, 16, torch.bfloat16, rotary=True).run(quantised, [[(0, 40)], [(0, 1)]])
    decodes = [(index, 1) for index in range(9)]
    Attention(6, 2, 80, 24, torch.float32, sliding_window=20).run(TritonAttention(), [[(0, 40)], decodes])


if __name__ == "__main__":
    compile_instead_of_running(int(sys.argv[1]))
    compile_attention(int(sys.argv[1]))
