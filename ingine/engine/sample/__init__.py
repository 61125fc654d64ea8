"""Samples tokens: processes the logits of a batch, and calls the kernels of `kernels.sampling`."""
