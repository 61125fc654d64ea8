"""What worker and producer share, and nothing else. `docs/protocol.md` says it in prose."""
