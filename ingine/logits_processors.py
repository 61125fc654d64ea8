"""What changes logits before a token is chosen: `min_tokens`, `logit_bias` and the penalties.

Each touches only the entries it is about, those of all sequences of the batch in one indexed operation.
"""

import numpy as np
import torch
from torch import Tensor

from ingine.sequence import Sequence, SequenceAhead


def process(logits: Tensor, seqs: list[Sequence | SequenceAhead]) -> Tensor:
    """The logits [num_seqs, vocab_size] as the sequences want them, in float32; or `logits` as they are, if
    nothing changes. They are overwritten where they are float32.
    """
    masked = [
        (row, [token_id for token_id in seq.end_token_ids if token_id < logits.shape[1]])
        for row, seq in enumerate(seqs)
        if seq.num_output_tokens < seq.params.min_tokens
    ]
    biased = [(row, seq.params.logit_bias) for row, seq in enumerate(seqs) if seq.params.logit_bias]
    penalised = [(row, seq) for row, seq in enumerate(seqs) if seq.token_counts is not None]
    if not (masked or biased or penalised):
        return logits
    logits = logits.float()
    if masked:
        _mask(logits, masked)
    if biased:
        _add_bias(logits, biased)
    if penalised:
        _penalise(logits, penalised)
    return logits


def _mask(logits: Tensor, rows: list[tuple[int, list[int]]]) -> None:
    """Make the given tokens impossible."""
    logits.view(-1).index_fill_(0, _entries(logits, rows), -torch.inf)


def _add_bias(logits: Tensor, rows: list[tuple[int, dict[int, float]]]) -> None:
    entries = _entries(logits, [(row, list(bias)) for row, bias in rows])
    values = np.concatenate([list(bias.values()) for _, bias in rows]).astype(np.float32)
    logits.view(-1).index_add_(0, entries, torch.from_numpy(values).to(logits.device))


def _penalise(logits: Tensor, rows: list[tuple[int, Sequence | SequenceAhead]]) -> None:
    """Repetition penalty on tokens of prompt and output (CTRL, Keskar et al. 2019), then OpenAI's frequency
    and presence penalties on those of the output."""
    device = logits.device
    entries = _entries(logits, [(row, seq.token_counts.token_ids) for row, seq in rows])
    counts = torch.from_numpy(np.concatenate([seq.token_counts.counts for _, seq in rows])).to(device)
    params = np.array(
        [
            (p.repetition_penalty, p.frequency_penalty, p.presence_penalty)
            for p in (seq.params for _, seq in rows)
        ],
        dtype=np.float32,
    )
    per_entry = np.repeat(params, [len(seq.token_counts.token_ids) for _, seq in rows], axis=0)
    repetition, frequency, presence = torch.from_numpy(per_entry).to(device).unbind(1)

    values = logits.view(-1).index_select(0, entries)
    values = torch.where(values > 0, values / repetition, values * repetition)
    logits.view(-1).index_copy_(0, entries, values - frequency * counts - presence * (counts > 0))


def _entries(logits: Tensor, rows: list[tuple[int, list[int] | np.ndarray]]) -> Tensor:
    """Where in all of `logits` the given columns of the given rows are; no entry may come twice."""
    entries = [row * logits.shape[1] + np.asarray(token_ids, dtype=np.int64) for row, token_ids in rows]
    return torch.from_numpy(np.concatenate(entries)).to(logits.device)
