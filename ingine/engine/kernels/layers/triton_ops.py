"""The operations of a decoder between its matrix products, each one Triton kernel."""

import torch
import triton
from torch import Tensor

from ingine.engine.kernels.layers.ops import LayerOps
from ingine.engine.kernels.triton.layer_ops import add_rms_norm_kernel, rms_norm_kernel, silu_mul_kernel

SILU_BLOCK = 1024
"""Number of columns of a program: a decode step has few and long rows, so each row is split."""


class TritonOps(LayerOps):
    """Operations for CUDA tensors in float32, bfloat16 and float16. They equal torch's, except that squares
    are summed in another order. A row's result does not depend on the other rows.
    """

    name = "triton"

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Normalise x [T, size] or [T, heads, size], a view whose last dimension is contiguous."""
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        num_tokens, num_heads, size = x.shape if x.dim() == 3 else (x.shape[0], 1, x.shape[1])
        token_stride, head_stride = x.stride()[:2]
        block = triton.next_power_of_2(size)
        rms_norm_kernel[(num_tokens, num_heads)](
            x, weight, out, token_stride, head_stride, size, eps, BLOCK=block, num_warps=_num_warps(block)
        )
        return out

    def add_rms_norm(self, residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Add and normalise residual and x, both contiguous [T, size]."""
        out = torch.empty_like(residual)
        num_tokens, size = residual.shape
        block = triton.next_power_of_2(size)
        add_rms_norm_kernel[(num_tokens,)](
            residual, x, weight, out, size, eps, BLOCK=block, num_warps=_num_warps(block)
        )
        return out

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """Multiply the halves of a contiguous gate_up."""
        num_tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
        out = gate_up.new_empty((num_tokens, size))
        silu_mul_kernel[(num_tokens, triton.cdiv(size, SILU_BLOCK))](gate_up, out, size, BLOCK=SILU_BLOCK)
        return out


def _num_warps(block: int) -> int:
    """Return warps of at least eight elements a thread: 16 bytes of bfloat16, the widest load."""
    return min(max(block // 256, 1), 16)
