"""Make the tokens impossible that a grammar forbids. This is the definition, in torch, for every device."""

import numpy as np
import torch
from torch import Tensor

from ingine.engine.communication.transfer import to_device


def mask(logits: Tensor, rows: np.ndarray, masks: np.ndarray) -> None:
    """Set logits to -inf, in place, where a mask's bit is 0.

    logits: [num_rows, vocab_size], of any float dtype. rows: [num_masks] int64, the row of each mask, no row
    twice. masks: [num_masks, num_words] int32; bit t % 32 of word t // 32 says whether token t is allowed.
    """
    vocab_size = logits.shape[1]
    on_device = to_device(masks, logits.device)
    bits = (on_device[:, :, None] >> torch.arange(32, dtype=torch.int32, device=logits.device)) & 1
    forbidden = bits.view(len(masks), -1)[:, :vocab_size] == 0
    index = to_device(rows, logits.device)
    logits.index_copy_(0, index, logits.index_select(0, index).masked_fill_(forbidden, -torch.inf))
