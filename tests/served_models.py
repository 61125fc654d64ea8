"""The models that workers in tests claim to serve."""

from ingine.worker.served_model import ServedModel

TINY = ServedModel(frozenset({"tiny"}), "0123456789abcdef", "float32")
OTHER = ServedModel(frozenset({"other"}), "fedcba9876543210", "float32")
TINY_IN_BFLOAT16 = ServedModel(TINY.names, TINY.weights, "bfloat16")
