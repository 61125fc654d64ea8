"""Compiles Triton kernels for GPUs on a machine that has none, down to machine code, and runs none.

    python -m tests.engine.compile_kernels

What the interpreter accepts is not all that the compiler does. Prints, for each kernel that was compiled, the
compute capability, its name, the bytes of shared memory that a program of it takes, and the bytes of a thread
that did not fit into registers.
"""

import re
import subprocess
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from ingine.engine.kernels.attention import triton as triton_attention
from ingine.engine.kernels.attention.triton import TritonAttention
from ingine.engine.kernels.layers.stored import Int4Matrix, ScaledMatrix
from ingine.engine.kernels.layers.triton_ops import TritonOps
from ingine.engine.kernels.layers.triton_weights import TritonWeights
from ingine.engine.kernels.sampling import cuda as device_sampling
from tests.engine.paged_attention import Attention

NUM_SMS = 132
"""Number of an H100's multiprocessors, so that one sequence is split as there."""

ONE_SEQUENCE = [[(0, 40)], [(0, 1)]]
MANY_DECODES = [[(0, 40)], [(index, 1) for index in range(NUM_SMS)]]
"""So many decodes that none is split."""


class AbsentGPU:
    """The parts of a GPU driver that compiling needs."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # triton keeps what it compiled for a device

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_instead_of_running() -> None:
    triton_attention._num_sms = lambda device: NUM_SMS
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        print(
            driver.active.capability, self.__name__, kernel.metadata.shared, stack_bytes(kernel.asm["cubin"])
        )
        return kernel

    JITFunction.run = compile_only


def stack_bytes(cubin: bytes) -> int:
    """Bytes of stack to which registers are spilled."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", usage)[1])


def compile_attention(capability: int) -> None:
    """Prefills and decodes, split and not, over quantised KV and not. Most shapes for the newest GPU alone,
    since a kernel takes half a second."""
    for quantised in ("fp8" if capability >= 89 else "int8", "int4"):
        layer = Attention(12, 2, 128, 16, torch.bfloat16, rotary=True)
        layer.run(TritonAttention(quantised), ONE_SEQUENCE)
    if capability >= 90:
        Attention(6, 2, 80, 24, torch.float32, sliding_window=20).run(TritonAttention(), MANY_DECODES)
        Attention(12, 2, 128, 16, torch.float32).run(TritonAttention("int8"), MANY_DECODES)
        Attention(12, 2, 128, 16, torch.float32).run(TritonAttention("int4"), MANY_DECODES)
        Attention(4, 1, 256, 16, torch.bfloat16).run(TritonAttention(), ONE_SEQUENCE)


def compile_layers_and_sampling() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, weight = torch.zeros(2, 576, dtype=dtype), torch.zeros(576, dtype=dtype)
        TritonOps().rms_norm(x, weight, 1e-5)
        TritonOps().add_rms_norm(x, x, weight, 1e-5)
        TritonOps().silu_mul(x)
        device_sampling.choose(torch.zeros(2, 2000, dtype=dtype), torch.zeros(2, device_sampling.NUM_PARAMS))


def compile_products(capability: int) -> None:
    """Compile products of few rows and of many, for each kind of weights; a second type only for the newest
    GPU."""
    n, k = 64, 2048
    codes = torch.zeros(n, k // 2, dtype=torch.uint8)
    scales, numbers = torch.ones(n, k // 128), torch.zeros(n, k, dtype=torch.int8)
    matrices = [
        Int4Matrix((n, k), codes, scales.half(), scales.half()),
        ScaledMatrix((n, k), numbers, scales[:, :1].contiguous(), (1, k)),
        ScaledMatrix((n, k), numbers.view(torch.float8_e4m3fn), torch.ones(1, 1), (n, k)),
    ]
    for matrix in matrices:
        for dtype in (torch.bfloat16, torch.float16)[: 2 if capability >= 90 else 1]:
            product = TritonWeights().pack_stored([matrix], torch.zeros(n, dtype=dtype), dtype)
            for num_rows in (1, 128):
                product(torch.zeros(num_rows, k, dtype=dtype))


if __name__ == "__main__":
    compile_instead_of_running()
    for capability in (80, 89, 90):
        driver.set_active(AbsentGPU(capability))
        compile_attention(capability)
        compile_products(capability)
    compile_layers_and_sampling()
