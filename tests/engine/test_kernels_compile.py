"""Triton's compiler, for an H100, takes the kernels for layers and sampling: the interpreter takes more than
it does."""

import os
import subprocess
import sys

from tests.engine.marks import needs_triton

COMPILE = """
import torch

from tests.engine.compile_kernels import compile_instead_of_running

compile_instead_of_running(90)

from ingine.device_sampling import choose
from ingine.layers.triton_ops import TritonOps

for dtype in (torch.float32, torch.bfloat16, torch.float16):
    x, weight = torch.zeros(2, 576, dtype=dtype), torch.zeros(576, dtype=dtype)
    TritonOps().rms_norm(x, weight, 1e-5)
    TritonOps().add_rms_norm(x, x, weight, 1e-5)
    TritonOps().silu_mul(x)
    choose(torch.zeros(2, 2000, dtype=dtype), torch.zeros(2, 5))
"""


@needs_triton
def test_kernels_of_layers_and_sampling_compile_for_a_gpu():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    compiled = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False
    )
    assert compiled.returncode == 0, compiled.stderr
    names = [line.split()[0] for line in compiled.stdout.splitlines()]
    assert sorted(names) == sorted(
        3 * ["rms_norm_kernel", "add_rms_norm_kernel", "silu_mul_kernel", "choose_kernel"]
    )
