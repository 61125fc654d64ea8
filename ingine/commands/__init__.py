"""The commands of `ingine` that need the engine, or everything. Each imports what it needs as it runs."""
