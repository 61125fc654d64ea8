"""Chooses the tokens of each sequence that a step computes, and the blocks that hold their KV."""
