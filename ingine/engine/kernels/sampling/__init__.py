"""Chooses tokens from logits: one interface, the reference in torch, and the Triton implementation."""
