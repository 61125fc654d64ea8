"""What changes logits before a token is chosen: `min_tokens`, `logit_bias` and the penalties.

Each touches only the entries it is about, those of all sequences of the batch in one indexed operation, and
waits for no device. So it serves sequences too whose last token only the device knows as yet.
"""

import numpy as np
import torch
from torch import Tensor

from ingine.engine.run.transfer import to_device
from ingine.engine.schedule.sequence import LogitsProcessing, Sequence, SequenceAhead


def process(logits: Tensor, seqs: list[Sequence | SequenceAhead], pending: Tensor | None = None) -> Tensor:
    """The logits [num_seqs, vocab_size] as the sequences want them, in float32; or `logits` as they are, if
    nothing changes. They are overwritten where they are float32.

    `pending` [num_seqs] int64, on the device: the sampled token that the host has not seen, of each sequence
    whose `num_pending_tokens` is 1; -1 for the others, and where there was none to choose: such a row may get
    any logits. Only asked for where there are such sequences.
    """
    masked = [
        (row, seq.processing.end_token_ids)
        for row, seq in enumerate(seqs)
        if seq.num_output_tokens + seq.num_pending_tokens < seq.params.min_tokens
    ]
    biased = [(row, seq.processing) for row, seq in enumerate(seqs) if len(seq.processing.biases)]
    penalised = [(row, seq) for row, seq in enumerate(seqs) if seq.token_counts is not None]
    if not (masked or biased or penalised):
        return logits
    logits = logits.float()
    if masked:
        _mask(logits, masked)
    if biased:
        _add_bias(logits, biased)
    if penalised:
        _penalise(logits, penalised, pending)
    return logits


def _mask(logits: Tensor, rows: list[tuple[int, np.ndarray]]) -> None:
    """Make the given tokens impossible, those of them that the model has."""
    rows = [(row, token_ids[token_ids < logits.shape[1]]) for row, token_ids in rows]
    logits.view(-1).index_fill_(0, _entries(logits, rows), -torch.inf)


def _add_bias(logits: Tensor, rows: list[tuple[int, LogitsProcessing]]) -> None:
    entries = _entries(logits, [(row, of_seq.bias_token_ids) for row, of_seq in rows])
    values = np.concatenate([of_seq.biases for _, of_seq in rows])
    logits.view(-1).index_add_(0, entries, to_device(values, logits.device))


def _penalise(
    logits: Tensor, rows: list[tuple[int, Sequence | SequenceAhead]], pending: Tensor | None
) -> None:
    """Repetition penalty on tokens of prompt and output (CTRL, Keskar et al. 2019), then OpenAI's frequency
    and presence penalties on those of the output."""
    entries = _entries(logits, [(row, seq.token_counts.token_ids) for row, seq in rows])
    counts = to_device(np.concatenate([seq.token_counts.counts for _, seq in rows]), logits.device)
    params = np.array(
        [
            (p.repetition_penalty, p.frequency_penalty, p.presence_penalty)
            for p in (seq.params for _, seq in rows)
        ],
        dtype=np.float32,
    )
    per_entry = np.repeat(params, [len(seq.token_counts.token_ids) for _, seq in rows], axis=0)
    ahead = [index for index, (_, seq) in enumerate(rows) if seq.num_pending_tokens]
    if ahead:
        of_ahead = to_device(np.array([rows[index][0] for index in ahead]), logits.device)
        entries, counts = _count_pending(entries, counts, of_ahead, pending, logits.shape[1])
        per_entry = np.concatenate((per_entry, params[ahead]))
    repetition, frequency, presence = to_device(per_entry, logits.device).unbind(1)

    values = logits.view(-1).index_select(0, entries)
    values = torch.where(values > 0, values / repetition, values * repetition)
    logits.view(-1).index_copy_(0, entries, values - frequency * counts - presence * (counts > 0))


def _count_pending(
    entries: Tensor, counts: Tensor, rows: Tensor, pending: Tensor, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """Entries and counts with the pending tokens of `rows` [num_rows] int64 counted: one entry more for each.
    Where the sequence had the token before, two entries are the same, and so are their counts.
    """
    pending_entries = torch.arange(len(pending), device=pending.device) * vocab_size + pending
    row_of_entry = entries // vocab_size
    # A pending -1 makes the last entry of the row before, which is none of this row's.
    is_pending = entries == pending_entries[row_of_entry]
    counts = counts + is_pending
    total = torch.zeros(len(pending), device=counts.device).index_add_(0, row_of_entry, counts * is_pending)
    added = torch.maximum(pending_entries, pending_entries - pending)[rows]  # inside the row, for -1 too
    return torch.cat((entries, added)), torch.cat((counts, total[rows].clamp(min=1)))


def _entries(logits: Tensor, rows: list[tuple[int, np.ndarray]]) -> Tensor:
    """Where in all of `logits` the given columns of the given rows are; no entry may come twice."""
    entries = [row * logits.shape[1] + token_ids for row, token_ids in rows]
    return to_device(np.concatenate(entries), logits.device)
