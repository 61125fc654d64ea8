"""What a test needs of the machine."""

import pytest

from ingine import native

needs_native = pytest.mark.skipif(
    native.library() is None, reason="this machine has no C++ compiler that builds the native kernels"
)
