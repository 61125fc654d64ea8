"""The small operations of a decoder, with one program for each row or piece of a row. They compute in float32
and round where `TorchOps` rounds.
"""

import triton
import triton.language as tl


@triton.jit
def rms_norm_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    token_stride,
    head_stride,
    size,
    eps,
    BLOCK: tl.constexpr,
):
    """Program (token, head) normalises x[token, head, :size] into a contiguous out."""
    token, head = tl.program_id(0), tl.program_id(1)
    row = token.to(tl.int64) * tl.num_programs(1) + head
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    x_row = x_ptr + token.to(tl.int64) * token_stride + head * head_stride
    x = tl.load(x_row + columns, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    normed = x * tl.rsqrt(tl.sum(x * x) / size + eps) * weight
    tl.store(out_ptr + row * size + columns, normed, mask=inside)


@triton.jit
def add_rms_norm_kernel(residual_ptr, x_ptr, weight_ptr, out_ptr, size, eps, BLOCK: tl.constexpr):
    """Program (row) adds x to residual in place and normalises the sum, rounded as it is stored, into out."""
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    offsets = tl.program_id(0).to(tl.int64) * size + columns
    residual = tl.load(residual_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    total = (residual + x).to(residual_ptr.dtype.element_ty)
    tl.store(residual_ptr + offsets, total, mask=inside)
    total = total.to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    normed = total * tl.rsqrt(tl.sum(total * total) / size + eps) * weight
    tl.store(out_ptr + offsets, normed, mask=inside)


@triton.jit
def silu_mul_kernel(gate_up_ptr, out_ptr, size, BLOCK: tl.constexpr):
    """Program (row, piece) multiplies SiLU of gate_up[row, :size] by gate_up[row, size:]."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    gate_row = gate_up_ptr + row * 2 * size
    gate = tl.load(gate_row + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_row + size + columns, mask=inside, other=0.0).to(tl.float32)
    activated = (gate / (1.0 + tl.exp(-gate))).to(gate_up_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + row * size + columns, activated * up, mask=inside)
