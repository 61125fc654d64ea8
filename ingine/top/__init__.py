"""`ingine top`: a live board of one queue. `board` has its state, `frame` draws it, `run` connects them."""
