"""The layers that every decoder is made of."""
