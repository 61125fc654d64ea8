"""Packs a scheduled batch into tensors, runs the model, and samples where a sequence has caught up."""

from itertools import accumulate

import numpy as np
import torch

from ingine.attention import AttentionMetadata, KVCache
from ingine.models import Decoder
from ingine.sampler import SampledToken, sample
from ingine.scheduler import ScheduledBatch
from ingine.sequence import Sequence, SequenceAhead

_Work = tuple[Sequence, int, list[int]]
"""A sequence, how many of its tokens to compute, and the draft that may follow them."""


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
            zip(batch.seqs, batch.num_tokens, batch.drafts, strict=True),
            key=lambda item: (item[1] + len(item[2]) > 1, item[0].num_computed_tokens),
        )
        query_lens = [num_tokens + len(draft) for _, num_tokens, draft in work]
        query_start = [0, *accumulate(query_lens)]
        input_ids, positions, metadata = self._pack(work, query_lens, query_start)
        hidden = self._model.forward(input_ids, positions, self._kv_caches, metadata)

        caught_up: list[_Work] = []
        rows: list[int] = []
        states: list[Sequence | SequenceAhead] = []  # what each row is sampled as
        for item, end in zip(work, query_start[1:], strict=True):
            seq, num_tokens, draft = item
            if num_tokens == seq.num_uncomputed_tokens:
                caught_up.append(item)
                rows += range(end - len(draft) - 1, end)
                states.append(seq)
                if draft:
                    states += seq.ahead(draft)
        if not rows:
            return []
        logits = self._model.compute_logits(hidden[torch.tensor(rows, device=self._device)])
        return _split(sample(logits, states), caught_up)

    def _pack(
        self, work: list[_Work], query_lens: list[int], query_start: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor, AttentionMetadata]:
        computed = [seq.num_computed_tokens for seq, _, _ in work]
        kv_lens = [done + new for done, new in zip(computed, query_lens, strict=True)]
        token_ids: list[int] = []
        for (seq, num_tokens, draft), start in zip(work, computed, strict=True):
            token_ids += seq.token_ids[start : start + num_tokens]
            token_ids += draft

        seq_of_token = np.repeat(np.arange(len(work)), query_lens)
        positions = np.arange(len(token_ids)) + (np.array(computed) - query_start[:-1])[seq_of_token]
        tables = [seq.block_table for seq, _, _ in work]
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


def _split(tokens: list[SampledToken], caught_up: list[_Work]) -> list[tuple[Sequence, list[SampledToken]]]:
    """Each sequence's own of the sampled tokens, as far as they count.

    What was sampled after one that is not as drafted follows what never was.
    """
    found, start = [], 0
    for seq, _, draft in caught_up:
        num_right = 0
        while num_right < len(draft) and tokens[start + num_right].token_id == draft[num_right]:
            num_right += 1
        found.append((seq, tokens[start : start + num_right + 1]))
        start += len(draft) + 1
    return found
