"""The worker: jobs from Redis streams, through the engine, to token logs and channels."""
