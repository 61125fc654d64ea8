"""Which tokens of which sequences a step computes, and where their KV lies."""
