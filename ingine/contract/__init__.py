"""Everything that workers and producers share. `docs/protocol.md` describes it in prose."""
