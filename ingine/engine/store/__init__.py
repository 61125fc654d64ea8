"""A model on the disk: where it lies, its name for its content, and its own sampling parameters."""
