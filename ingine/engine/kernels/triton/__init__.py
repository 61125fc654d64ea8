"""Kernels for GPUs, in Triton. Import these modules only where triton is installed.

If TRITON_INTERPRET=1 is in the environment before the first import, they run on CPU tensors in triton's
interpreter, very slowly: so they are tested without a GPU. Each has a reference in torch.
"""

import triton

if triton.knobs.runtime.interpret:
    from ingine.engine.kernels.triton.interpreter import accept_numpy_2_4

    accept_numpy_2_4()
