"""What changes logits before a token is chosen: `min_tokens`, `logit_bias` and the penalties.

Each works in place, and touches only the entries it is about, those of all sequences of the batch in one
indexed operation.
"""

import numpy as np
import torch
from torch import Tensor

from ingine.sequence import Sequence


def mask_ends(logits: Tensor, seqs: list[Sequence]) -> None:
    """Make tokens that would end a sequence impossible while it has fewer than `min_tokens` output tokens."""
    rows = [
        (row, list(seq.end_token_ids))
        for row, seq in enumerate(seqs)
        if seq.num_output_tokens < seq.params.min_tokens and seq.end_token_ids
    ]
    if rows:
        logits[_entries(rows, logits.device)] = -torch.inf


def add_bias(logits: Tensor, seqs: list[Sequence]) -> None:
    """Add `logit_bias`."""
    biases = [(row, seq.params.logit_bias) for row, seq in enumerate(seqs) if seq.params.logit_bias]
    if biases:
        entries = _entries([(row, list(bias)) for row, bias in biases], logits.device)
        values = np.concatenate([list(bias.values()) for _, bias in biases]).astype(np.float32)
        logits[entries] += torch.from_numpy(values).to(logits.device)


def penalise(logits: Tensor, seqs: list[Sequence]) -> None:
    """Repetition penalty on tokens of prompt and output (CTRL, Keskar et al. 2019), then OpenAI's frequency
    and presence penalties on those of the output."""
    penalised = [(row, seq) for row, seq in enumerate(seqs) if seq.token_counts is not None]
    if not penalised:
        return
    device = logits.device
    entries = _entries([(row, seq.token_counts.token_ids) for row, seq in penalised], device)
    counts = torch.from_numpy(np.concatenate([seq.token_counts.counts for _, seq in penalised])).to(device)
    params = np.array(
        [
            (p.repetition_penalty, p.frequency_penalty, p.presence_penalty)
            for p in (seq.params for _, seq in penalised)
        ],
        dtype=np.float32,
    )
    per_entry = np.repeat(params, [len(seq.token_counts.token_ids) for _, seq in penalised], axis=0)
    repetition, frequency, presence = torch.from_numpy(per_entry).to(device).unbind(1)

    values = logits[entries]
    values = torch.where(values > 0, values / repetition, values * repetition)
    logits[entries] = values - frequency * counts - presence * (counts > 0)


def _entries(rows: list[tuple[int, list[int] | np.ndarray]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and column index of the given columns of the given rows; no entry may come twice."""
    columns = np.concatenate([np.asarray(token_ids, dtype=np.int64) for _, token_ids in rows])
    row_of = np.repeat([row for row, _ in rows], [len(token_ids) for _, token_ids in rows])
    return torch.from_numpy(row_of).to(device), torch.from_numpy(columns).to(device)
