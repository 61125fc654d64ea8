"""`ingine demo`: kills one of two workers, and counts every token."""
