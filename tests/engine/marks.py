"""What a test needs of the machine."""

from importlib.util import find_spec

import pytest
import torch

from ingine import native
from ingine.native.weights import is_supported

needs_native = pytest.mark.skipif(
    native.library() is None, reason="this machine has no C++ compiler that builds the native kernels"
)

HAS_TRITON = find_spec("triton") is not None
"""Where there is no GPU its interpreter runs the kernels: see tests/conftest.py."""

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is for Linux")

needs_interpreter = pytest.mark.skipif(
    not HAS_TRITON or torch.cuda.is_available(),
    reason="runs kernels on the CPU, in triton's interpreter; on a GPU `make gpu-check` runs them",
)

needs_native_weights = pytest.mark.skipif(
    (library := native.library()) is None or not is_supported(library),
    reason="needs a CPU with AVX-512 BF16 and VNNI",
)
