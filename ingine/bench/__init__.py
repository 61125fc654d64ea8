"""`ingine bench`: continuous batching against one request at a time, Hugging Face, and Redis."""
