"""How tokens are chosen from logits: one interface, the reference in torch, and the Triton implementation."""
