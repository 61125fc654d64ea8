"""The commands of `ingine` that need the engine, or everything at once. Each imports what it needs as it runs."""
