"""The kernels compile, for GPUs that are not there: triton's interpreter takes more than the compiler."""

import os
import subprocess
import sys
from collections import Counter
from typing import NamedTuple

import pytest

from tests.engine.marks import needs_triton

pytestmark = needs_triton

SHARED_MEMORY = 99 << 10
"""Bytes that a program may have on the smallest GPUs, of compute capability 8.6 and 8.9."""

MAX_STACK_BYTES = 512
"""Limit of spilled registers per thread. Some kernels spill where float32 is made of quantised KV, and on
8.0: 216 to 272 bytes, by the version of triton (3.6 to 3.9). Too large a tile would spill thousands."""


class Kernel(NamedTuple):
    capability: int
    name: str
    shared_bytes: int
    stack_bytes: int


@pytest.fixture(scope="module")
def kernels() -> list[Kernel]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.engine.compile_kernels"]
    compiled = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert compiled.returncode == 0, compiled.stderr
    return [
        Kernel(int(capability), name, int(shared), int(stack))
        for capability, name, shared, stack in map(str.split, compiled.stdout.splitlines())
    ]


@pytest.mark.parametrize("capability", [80, 89, 90])
def test_kernels_of_attention_compile_for_each_generation(kernels, capability):
    names = {kernel.name for kernel in kernels if kernel.capability == capability}
    assert names >= {"_write_kernel", "_decode_kernel", "_reduce_kernel", "_prefill_kernel"}


def test_kernels_of_layers_and_sampling_compile_for_each_dtype(kernels):
    counts = Counter(kernel.name for kernel in kernels)
    for name in ("rms_norm_kernel", "add_rms_norm_kernel", "silu_mul_kernel", "choose_kernel"):
        assert counts[name] == 3


def test_programs_take_no_more_than_small_gpus_have(kernels):
    assert max(kernel.shared_bytes for kernel in kernels) <= SHARED_MEMORY
    assert max(kernel.stack_bytes for kernel in kernels) <= MAX_STACK_BYTES
