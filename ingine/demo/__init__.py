"""`ingine demo`: the promise in two minutes. Two workers, one is killed, and every token is counted."""
