"""`ingine bench`: one at a time against continuous batching, against Hugging Face, and through Redis."""
