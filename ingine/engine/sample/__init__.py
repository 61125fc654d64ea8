"""From logits to tokens: processes a batch's logits, and has one of `kernels.sampling` choose."""
