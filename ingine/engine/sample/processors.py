"""Changes logits before a token is chosen: `allowed_token_ids`, `bad_words`, `min_tokens`, `logit_bias` and
the penalties.

Each processor changes only the affected entries, of all sequences of the batch in one indexed operation, and
does not wait for the device. So it also works for sequences whose last token only the device knows yet.
"""

import numpy as np
import torch
from torch import Tensor

from ingine.engine.communication.transfer import to_device
from ingine.engine.schedule.sequence import Sequence, SequenceAhead
from ingine.sampling_params import SamplingParams

Seqs = list[Sequence | SequenceAhead]
"""The sequence of each row of the logits."""


def process(logits: Tensor, seqs: Seqs, pending: Tensor | None = None) -> Tensor:
    """Apply each sequence's parameters to its row of logits [num_seqs, vocab_size]. Returns them in float32,
    or `logits` itself if no sequence changes any. float32 logits are overwritten.

    pending: [num_seqs] int64 on the device: the sampled token that the host has not read, of each sequence
    whose `num_pending_tokens` is 1. It is -1 for other sequences, and where no token could be chosen; the
    logits of such a row are arbitrary. Needed only for sequences with a pending token and with penalties or
    `bad_words`.
    """
    restricted = [row for row, seq in enumerate(seqs) if seq.processing.restricts]
    masked = [
        row
        for row, seq in enumerate(seqs)
        if seq.num_output_tokens + seq.num_pending_tokens < seq.params.min_tokens
        # The mask of a grammar allows an end if it allows nothing else.
        and seq.params.structured_outputs is None
    ]
    biased = [row for row, seq in enumerate(seqs) if len(seq.processing.biases)]
    penalised = [row for row, seq in enumerate(seqs) if seq.token_counts is not None]
    if not (restricted or masked or biased or penalised):
        return logits
    logits = logits.float()
    if restricted:
        _restrict(logits, seqs, restricted, pending)
    if masked:
        _mask(logits, seqs, masked)
    if biased:
        _add_bias(logits, seqs, biased)
    if penalised:
        _penalise(logits, seqs, penalised, pending)
    return logits


def _restrict(logits: Tensor, seqs: Seqs, rows: list[int], pending: Tensor | None) -> None:
    """Set the logits of all tokens but `allowed_token_ids`, and of those that complete a bad word, to
    -inf.
    """
    if allowed := [row for row in rows if seqs[row].processing.allowed_token_ids is not None]:
        token_ids = [seqs[row].processing.allowed_token_ids for row in allowed]
        entries = _entries(logits, allowed, token_ids)
        kept = logits.view(-1).index_select(0, entries)
        logits.index_fill_(0, to_device(np.array(allowed), logits.device), -torch.inf)
        logits.view(-1).index_copy_(0, entries, kept)
    if with_words := [row for row in rows if seqs[row].processing.bad_words is not None]:
        token_ids = [_forbidden(seqs[row]) for row in with_words]
        token_ids = [of_row[of_row < logits.shape[1]] for of_row in token_ids]
        logits.view(-1).index_fill_(0, _entries(logits, with_words, token_ids), -torch.inf)
    if behind := [row for row in with_words if seqs[row].num_pending_tokens]:
        _forbid_after_pending(logits, seqs, behind, pending)


def _forbidden(seq: Sequence | SequenceAhead) -> np.ndarray:
    """The last tokens of the bad words that are certain to be forbidden next."""
    bad_words = seq.processing.bad_words
    return bad_words.single if seq.num_pending_tokens else bad_words.forbidden(seq.output_tail)


def _forbid_after_pending(logits: Tensor, seqs: Seqs, rows: list[int], pending: Tensor) -> None:
    """Forbid the last tokens of bad words whose last but one is the pending token, which only the device
    knows.
    """
    pairs = [seqs[row].processing.bad_words.forbidden_after_pending(seqs[row].output_tail) for row in rows]
    in_vocabulary = [last < logits.shape[1] for _, last in pairs]
    last = [of_row[is_in] for (_, of_row), is_in in zip(pairs, in_vocabulary, strict=True)]
    before = [of_row[is_in] for (of_row, _), is_in in zip(pairs, in_vocabulary, strict=True)]
    entries = _entries(logits, rows, last)
    expected = to_device(np.concatenate(before), logits.device)
    is_forbidden = pending[entries // logits.shape[1]] == expected
    # An entry may occur several times, after different tokens, so values are added instead of assigned.
    added = torch.zeros(len(entries), device=logits.device).masked_fill_(is_forbidden, -torch.inf)
    logits.view(-1).index_add_(0, entries, added)


def _mask(logits: Tensor, seqs: Seqs, rows: list[int]) -> None:
    """Set the logits of tokens that would end a sequence to -inf; ids beyond the vocabulary are ignored."""
    of_rows = [seqs[row].processing.end_token_ids for row in rows]
    token_ids = [of_row[of_row < logits.shape[1]] for of_row in of_rows]
    logits.view(-1).index_fill_(0, _entries(logits, rows, token_ids), -torch.inf)


def _add_bias(logits: Tensor, seqs: Seqs, rows: list[int]) -> None:
    of_rows = [seqs[row].processing for row in rows]
    entries = _entries(logits, rows, [of_row.bias_token_ids for of_row in of_rows])
    biases = np.concatenate([of_row.biases for of_row in of_rows])
    logits.view(-1).index_add_(0, entries, to_device(biases, logits.device))


def _penalise(logits: Tensor, seqs: Seqs, rows: list[int], pending: Tensor | None) -> None:
    """Apply the repetition penalty to tokens of prompt and output (CTRL, Keskar et al. 2019), then OpenAI's
    frequency and presence penalties to tokens of the output."""
    of_rows = [seqs[row].token_counts for row in rows]
    entries = _entries(logits, rows, [of_row.token_ids for of_row in of_rows])
    counts = to_device(np.concatenate([of_row.counts for of_row in of_rows]), logits.device)
    penalties = _penalties([seqs[row].params for row in rows])
    per_entry = np.repeat(penalties, [len(of_row.token_ids) for of_row in of_rows], axis=0)
    is_pending = np.array([seqs[row].num_pending_tokens > 0 for row in rows])
    if is_pending.any():
        rows_with_pending = to_device(np.array(rows)[is_pending], logits.device)
        entries, counts = _count_pending(entries, counts, rows_with_pending, pending, logits.shape[1])
        per_entry = np.concatenate((per_entry, penalties[is_pending]))
    repetition, frequency, presence = to_device(per_entry, logits.device).unbind(1)

    values = logits.view(-1).index_select(0, entries)
    values = torch.where(values > 0, values / repetition, values * repetition)
    logits.view(-1).index_copy_(0, entries, values - frequency * counts - presence * (counts > 0))


def _penalties(params: list[SamplingParams]) -> np.ndarray:
    """[num_rows, 3] float32: repetition, frequency and presence penalty."""
    rows = [(p.repetition_penalty, p.frequency_penalty, p.presence_penalty) for p in params]
    return np.array(rows, dtype=np.float32)


def _count_pending(
    entries: Tensor, counts: Tensor, rows: Tensor, pending: Tensor, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """Count the pending tokens of `rows` [num_rows] int64: returns entries and counts with one more entry for
    each row. If the sequence had the token before, two entries are equal and have the same count.
    """
    pending_entries = torch.arange(len(pending), device=pending.device) * vocab_size + pending
    row_of_entry = entries // vocab_size
    # A pending -1 gives the last entry of the row before, which matches no entry of this row.
    is_pending = entries == pending_entries[row_of_entry]
    counts = counts + is_pending
    total = torch.zeros(len(pending), device=counts.device).index_add_(0, row_of_entry, counts * is_pending)
    added = torch.maximum(pending_entries, pending_entries - pending)[rows]  # within the row, also for -1
    return torch.cat((entries, added)), torch.cat((counts, total[rows].clamp(min=1)))


def _entries(logits: Tensor, rows: list[int], token_ids: list[np.ndarray]) -> Tensor:
    """Return flat indices into `logits` of the given tokens of each of `rows`. Where values are assigned or
    added that differ, no index may occur twice.
    """
    entries = [row * logits.shape[1] + of_row for row, of_row in zip(rows, token_ids, strict=True)]
    return to_device(np.concatenate(entries), logits.device)
