"""Tokens that a grammar forbids, in one launch. The definition is `ingine.engine.kernels.sampling.masks`."""

import triton
import triton.language as tl


@triton.jit
def mask_kernel(logits_ptr, rows_ptr, masks_ptr, row_stride, vocab_size, num_words, BLOCK: tl.constexpr):
    """Program (index, block) sets logits[rows[index], block] to -inf where a bit of masks[index] is 0."""
    index = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + index)
    token_ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_token = token_ids < vocab_size
    words = tl.load(masks_ptr + index * num_words + token_ids // 32, mask=is_token, other=-1)
    is_forbidden = ((words >> (token_ids % 32)) & 1) == 0
    tl.store(logits_ptr + row * row_stride + token_ids, float("-inf"), mask=is_token & is_forbidden)
