"""Model definitions and loading: one lean decoder for the Llama-shaped families."""
