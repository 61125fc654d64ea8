"""Runs a step of the model on a device, from the scheduled batch to the chosen tokens."""
