"""The `ingine` command: every command of every part. It composes all of them."""
