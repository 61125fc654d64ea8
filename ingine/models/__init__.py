"""Model definitions and loading: one lean decoder for the Llama-shaped families."""

from ingine.models.config import ModelConfig
from ingine.models.decoder import Decoder
from ingine.models.loader import load_model, load_weights
from ingine.models.registry import ARCHITECTURES

__all__ = ["ARCHITECTURES", "Decoder", "ModelConfig", "load_model", "load_weights"]
