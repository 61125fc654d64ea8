"""Packs a scheduled batch into tensors, runs the model, and samples where a sequence has caught up."""

from collections.abc import Iterator
from itertools import accumulate, chain, islice
from typing import NamedTuple

import numpy as np
import torch

from ingine.attention import AttentionMetadata, KVCache
from ingine.models import Decoder
from ingine.sampler import SampledToken, sample
from ingine.scheduler import ScheduledBatch
from ingine.sequence import Sequence, SequenceAhead


class _Work(NamedTuple):
    """A sequence, how many of its tokens to compute, and what may follow those."""

    seq: Sequence
    num_tokens: int
    draft: list[int]

    @property
    def query_len(self) -> int:
        return self.num_tokens + len(self.draft)

    def states(self) -> Iterator[Sequence | SequenceAhead]:
        """The sequence as of each position that is sampled: its end, and that of each part of its draft."""
        return chain((self.seq,), self.seq.ahead(self.draft))


class ModelRunner:
    """`kv_caches` are what `model` allocated, of blocks of `block_size` tokens."""

    def __init__(self, model: Decoder, kv_caches: list[KVCache], block_size: int):
        self._model = model
        self._kv_caches = kv_caches
        self._block_size = block_size
        self._device = model.device

    @torch.inference_mode()
    def run(self, batch: ScheduledBatch) -> list[tuple[Sequence, list[SampledToken]]]:
        """Compute the batch's tokens. Returns the next token of each sequence that has caught up; with a
        draft the next ones, up to the first that is not as drafted."""
        # One query token first: the decodes, and whatever looks like one. Of these the shortest first.
        work = sorted(
            map(_Work, batch.seqs, batch.num_tokens, batch.drafts),
            key=lambda item: (item.query_len > 1, item.seq.num_computed_tokens),
        )
        query_start = [0, *accumulate(item.query_len for item in work)]
        input_ids, positions, metadata = self._pack(work, query_start)
        hidden = self._model.forward(input_ids, positions, self._kv_caches, metadata)

        sampled: list[_Work] = []
        rows: list[int] = []
        for item, end in zip(work, query_start[1:], strict=True):
            if item.num_tokens == item.seq.num_uncomputed_tokens:
                sampled.append(item)
                rows += range(end - len(item.draft) - 1, end)
        if not rows:
            return []
        logits = self._model.compute_logits(hidden[torch.tensor(rows, device=self._device)])
        tokens = iter(sample(logits, [state for item in sampled for state in item.states()]))
        per_seq = [list(islice(tokens, len(item.draft) + 1)) for item in sampled]
        return [(item.seq, _as_drafted(item.draft, own)) for item, own in zip(sampled, per_seq, strict=True)]

    def _pack(
        self, work: list[_Work], query_start: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor, AttentionMetadata]:
        query_lens = [item.query_len for item in work]
        computed = [item.seq.num_computed_tokens for item in work]
        kv_lens = [done + new for done, new in zip(computed, query_lens, strict=True)]
        token_ids: list[int] = []
        for (seq, num_tokens, draft), start in zip(work, computed, strict=True):
            token_ids += seq.token_ids[start : start + num_tokens]
            token_ids += draft

        seq_of_token = np.repeat(np.arange(len(work)), query_lens)
        positions = np.arange(len(token_ids)) + (np.array(computed) - query_start[:-1])[seq_of_token]
        tables = [item.seq.block_table for item in work]
        block_tables = np.empty((len(tables), max(map(len, tables))), dtype=np.int32)
        block_tables[:] = [[table[0]] for table in tables]
        for row, table in zip(block_tables, tables, strict=True):
            row[: len(table)] = table
        blocks = block_tables[seq_of_token, positions // self._block_size].astype(np.int64)
        metadata = AttentionMetadata(
            slot_mapping=self._tensor(blocks * self._block_size + positions % self._block_size),
            block_tables=self._tensor(block_tables),
            seq_lens=self._tensor(np.array(kv_lens, dtype=np.int32)),
            query_start_loc=self._tensor(np.array(query_start, dtype=np.int32)),
            num_decodes=query_lens.count(1),
            query_lens=query_lens,
            kv_lens=kv_lens,
        )
        return self._tensor(np.array(token_ids)), self._tensor(positions), metadata

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        # CUDA stages pageable memory before it returns; for other devices the array would have to live on.
        return torch.from_numpy(array).to(self._device, non_blocking=self._device.type == "cuda")


def _as_drafted(draft: list[int], tokens: list[SampledToken]) -> list[SampledToken]:
    """The tokens that count: what was sampled after one that is not as drafted follows what never was."""
    for num_right, (drafted, token) in enumerate(zip(draft, tokens, strict=False)):
        if token.token_id != drafted:
            return tokens[: num_right + 1]
    return tokens
