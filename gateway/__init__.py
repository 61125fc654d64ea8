"""The gateway: OpenAI's HTTP API over the queue. It is a producer, and has no state of its own."""
