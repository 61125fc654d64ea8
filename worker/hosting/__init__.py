"""Where engine and prompt readers live: a thread or a process, and the pipe to it."""
