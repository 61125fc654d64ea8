"""Rotary position embedding (Su et al., 2021), in the half-split form that Hugging Face checkpoints use."""

import torch
from torch import Tensor, nn


class RotaryEmbedding(nn.Module):
    """Computes the sines and cosines of a step's positions, once a step for all layers.

    There is no table of all positions: it would take 128 MiB for a 128k context and save no measurable time.
    """

    def __init__(
        self,
        inv_freq: tuple[float, ...],
        attention_scaling: float,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ):
        super().__init__()
        self.attention_scaling = attention_scaling
        self.dtype = dtype
        self.register_buffer(
            "inv_freq", torch.tensor(inv_freq, dtype=torch.float32, device=device), persistent=False
        )

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin of positions [T], each [T, 1, head_dim], for `apply_rotary`."""
        angles = positions[:, None, None].float() * self.inv_freq
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return torch.cat((cos, cos), dim=-1).to(self.dtype), torch.cat((-sin, sin), dim=-1).to(self.dtype)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [T, heads, head_dim]. The sign of the swapped halves is in `sin`: nothing is concatenated."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)
