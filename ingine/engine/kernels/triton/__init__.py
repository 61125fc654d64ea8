"""Kernels for GPUs, in Triton. Import these modules only where triton is installed.

With TRITON_INTERPRET=1 in the environment before the first import they run on CPU tensors, very slowly, in
triton's interpreter: that is how they are tested without a GPU. Each has a reference in torch beside it.
"""

import triton

if triton.knobs.runtime.interpret:
    from ingine.engine.kernels.triton.interpreter import accept_numpy_2_4

    accept_numpy_2_4()
