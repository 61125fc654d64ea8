"""The worker: takes jobs from Redis streams, and writes the engine's tokens to token logs and channels."""
