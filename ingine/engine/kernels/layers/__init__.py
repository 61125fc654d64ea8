"""The few layers that every decoder of ours is made of."""
