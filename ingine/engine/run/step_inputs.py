"""Packs a scheduled batch into arrays on the host: the inputs of a step of the model."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch

from ingine.engine.communication.transfer import to_device
from ingine.engine.kernels.attention import AttentionMetadata
from ingine.engine.schedule.scheduler import ScheduledBatch
from ingine.engine.schedule.sequence import Sequence


@dataclass(slots=True)
class Work:
    """The tokens that a step computes for one sequence."""

    seq: Sequence
    num_tokens: int
    """How many of the sequence's own tokens to compute."""
    draft: list[int]
    """Guessed tokens to follow these, which are computed too."""
    catches_up: bool
    """Whether these are the sequence's last tokens. If so, one token is sampled after them and one after each
    token of the draft."""

    @property
    def scored(self) -> range:
        """The positions of the prompt tokens whose log probabilities follow from the computed tokens."""
        seq = self.seq
        if not seq.needs_prompt_logprobs:
            return range(0)
        first = seq.num_computed_tokens + 1
        return range(first, min(first + self.num_tokens, seq.num_prompt_tokens))


@dataclass(slots=True)
class StepInputs:
    """The tokens of a step in the order of `AttentionMetadata`. Small enough to send to other processes."""

    input_ids: np.ndarray
    """[num_tokens] int64."""
    positions: np.ndarray
    """[num_tokens] int64."""
    slot_mapping: np.ndarray
    """[num_tokens] int64."""
    carried: np.ndarray | None
    """[num_decodes] int64: for a decode whose token the host does not know yet, the row of that token among
    the last step's sampled tokens; else -1. None if the host knows all tokens."""
    block_tables: np.ndarray
    """[num_seqs, max_blocks] int32."""
    query_lens: list[int]
    kv_lens: list[int]
    logits_rows: np.ndarray
    """[num_rows] int64: indices of the tokens after which one is sampled."""
    scored_rows: np.ndarray | None = None
    """[num_scored] int64: indices of the tokens before each scored prompt token; None: none is scored."""

    @property
    def num_decodes(self) -> int:
        return self.query_lens.count(1)

    @property
    def is_decode(self) -> bool:
        """Whether each sequence computes one token and has one sampled after it."""
        return len(self.query_lens) == len(self.input_ids) == len(self.logits_rows)

    def metadata(self, device: torch.device) -> AttentionMetadata:
        query_start = np.array([0, *accumulate(self.query_lens)], dtype=np.int32)
        return AttentionMetadata(
            slot_mapping=to_device(self.slot_mapping, device),
            block_tables=to_device(self.block_tables, device),
            seq_lens=to_device(np.array(self.kv_lens, dtype=np.int32), device),
            query_start_loc=to_device(query_start, device),
            num_decodes=self.num_decodes,
            query_lens=self.query_lens,
            kv_lens=self.kv_lens,
        )


def in_order(batch: ScheduledBatch) -> list[Work]:
    """Return the work of a batch, sequences with one query token first (decodes, and chunks of one token),
    and among those with one query token, or with several, the shortest KV first.
    """
    work = [
        Work(seq, num_tokens, draft, num_tokens == seq.num_uncomputed_tokens)
        for seq, num_tokens, draft in zip(batch.seqs, batch.num_tokens, batch.drafts, strict=True)
    ]
    return sorted(work, key=lambda one: (one.num_tokens + len(one.draft) > 1, one.seq.num_computed_tokens))


def pack(work: list[Work], block_size: int, rows_of_last_step: Mapping[Sequence, int]) -> StepInputs:
    """Pack `work`, which is from `in_order`, into arrays.

    rows_of_last_step: for each sequence with a pending token, its row among the last step's sampled tokens.
    """
    query_lens = [one.num_tokens + len(one.draft) for one in work]
    query_start = [0, *accumulate(query_lens)]
    computed = [one.seq.num_computed_tokens for one in work]
    token_ids: list[int] = []
    carried: list[int] = []
    logits_rows: list[int] = []
    scored_rows: list[int] = []
    for one, start, query_len, end in zip(work, computed, query_lens, query_start[1:], strict=True):
        tokens = one.seq.token_ids[start : start + one.num_tokens]
        is_pending = len(tokens) < one.num_tokens  # then the pending token is the only one to compute
        if query_len == 1:
            carried.append(rows_of_last_step[one.seq] if is_pending else -1)
        token_ids += [0] if is_pending else tokens
        token_ids += one.draft
        scored_rows += [end - query_len + position - 1 - start for position in one.scored]
        if one.catches_up:
            logits_rows += range(end - len(one.draft) - 1, end)

    seq_of_token = np.repeat(np.arange(len(work)), query_lens)
    positions = np.arange(len(token_ids)) + (np.array(computed) - query_start[:-1])[seq_of_token]
    block_tables = _block_tables([one.seq.block_table for one in work])
    blocks = block_tables[seq_of_token, positions // block_size].astype(np.int64)
    return StepInputs(
        input_ids=np.array(token_ids),
        positions=positions,
        slot_mapping=blocks * block_size + positions % block_size,
        carried=np.array(carried) if any(row >= 0 for row in carried) else None,
        block_tables=block_tables,
        query_lens=query_lens,
        kv_lens=[done + new for done, new in zip(computed, query_lens, strict=True)],
        logits_rows=np.array(logits_rows, dtype=np.int64),
        scored_rows=np.array(scored_rows, dtype=np.int64) if scored_rows else None,
    )


def _block_tables(tables: list) -> np.ndarray:
    rows = np.empty((len(tables), max(map(len, tables))), dtype=np.int32)
    rows[:] = [[table[0]] for table in tables]
    for row, table in zip(rows, tables, strict=True):
        row[: len(table)] = table
    return rows
