"""What a test needs of the machine."""

import pytest

from ingine import native
from ingine.native.weights import is_supported

needs_native = pytest.mark.skipif(
    native.library() is None, reason="this machine has no C++ compiler that builds the native kernels"
)

needs_native_weights = pytest.mark.skipif(
    (library := native.library()) is None or not is_supported(library),
    reason="needs a CPU with AVX-512 BF16 and VNNI",
)
