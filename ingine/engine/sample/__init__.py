"""From logits to tokens: one interface, a reference in torch, faster ones beside it."""
