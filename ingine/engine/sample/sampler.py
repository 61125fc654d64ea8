"""Samples the next token of every sequence of a batch from its logits.

The order of operations is vLLM's:

1. Reported log probabilities are computed from the unprocessed logits of the model.
2. `min_tokens` masks the tokens that would end a sequence; `logit_bias` is added.
3. Penalties: repetition (prompt and output), then frequency and presence (output).
4. Tokens that a sequence's grammar forbids are masked.
5. Greedy takes the largest logit. Otherwise temperature, min_p, top_k and top_p are applied, each to the
   tokens that the one before left, and one token is drawn by inverse CDF with the uniform number of (seed,
   position).

The model's `Kernels` choose tokens and compute log probabilities.
"""

import math
from typing import NamedTuple

import numpy as np
from torch import Tensor

from ingine.engine.communication.transfer import HostCopy, to_device
from ingine.engine.grammar.masks import StepMasks
from ingine.engine.kernels.sampling import cuda as device_sampling
from ingine.engine.kernels.sampling.interface import Sampling
from ingine.engine.kernels.sampling.reference import uniforms
from ingine.engine.sample.processors import process
from ingine.engine.schedule.sequence import Sequence, SequenceAhead


class SampledToken(NamedTuple):
    token_id: int | None
    """None if no token could be chosen, since the largest logit is not finite."""
    logprobs: dict | None
    """{token_id, logprob, rank, top: [[token_id, logprob], ...]}; None if the sequence does not
    ask for it."""


class Sampled:
    """The sampled tokens of a batch, in flight to the host."""

    def __init__(self, token_ids: Tensor, reports: "_Reports | None" = None):
        """token_ids: [num_rows] int64, -1 where no token could be chosen."""
        self.token_ids = token_ids
        self._reports = reports
        self._copy = HostCopy(token_ids, *(reports.values if reports else ()))

    def wait(self) -> list[SampledToken]:
        token_ids, *values = (tensor.tolist() for tensor in self._copy.wait())
        logprobs = self._reports.read(token_ids, values) if self._reports else {}
        return [
            SampledToken(token_id if token_id >= 0 else None, logprobs.get(row))
            for row, token_id in enumerate(token_ids)
        ]


class _Reports(NamedTuple):
    """The log probabilities of those rows of a batch whose sequences ask for them."""

    rows: list[int]
    num_top: list[int]
    values: tuple[Tensor, Tensor, Tensor, Tensor]
    """The result of `ingine.engine.kernels.sampling.logprobs.logprobs` for these rows."""

    def read(self, token_ids: list[int], values: list[list]) -> dict[int, dict]:
        """Return each row's report, by row, from `values` on the host."""
        found = {}
        for row, num_top, logprob, rank, top_ids, top in zip(self.rows, self.num_top, *values, strict=True):
            found[row] = report(token_ids[row], num_top, logprob, rank, top_ids, top)
        return found


def report(
    token_id: int, num_top: int, logprob: float, rank: int, top_ids: list[int], top: list[float]
) -> dict:
    """Return `SampledToken.logprobs` from a row of the values of `Sampling.logprobs`."""
    pairs = [[top_id, value] for top_id, value in zip(top_ids, top, strict=True) if value > -math.inf]
    return {"token_id": token_id, "logprob": logprob, "rank": rank, "top": pairs[:num_top]}


def sample(
    logits: Tensor,
    seqs: list[Sequence | SequenceAhead],
    sampling: Sampling,
    *,
    pending: Tensor | None = None,
    masks: StepMasks | None = None,
) -> Sampled:
    """Enqueue sampling of the next token of each of `seqs` from logits [num_seqs, vocab_size], which may be
    overwritten.

    pending: [num_seqs] int64: the last token of a sequence if the host does not know it yet, else -1. masks:
    of the rows whose sequences have a grammar.
    """
    if all(seq.is_plain and seq.params.greedy for seq in seqs):
        return Sampled(_choose(logits, seqs, sampling))
    wanted = [row for row, seq in enumerate(seqs) if seq.params.logprobs is not None]
    if not wanted:
        return Sampled(_choose(_process(logits, seqs, sampling, pending, masks), seqs, sampling))
    rows = to_device(np.array(wanted), logits.device)
    model_logits = logits.index_select(0, rows)  # a copy: the processors work in place
    token_ids = _choose(_process(logits, seqs, sampling, pending, masks), seqs, sampling)
    num_top = [seqs[row].params.logprobs for row in wanted]
    values = sampling.logprobs(model_logits, token_ids.index_select(0, rows), max(num_top))
    return Sampled(token_ids, _Reports(wanted, num_top, values))


def sampling_rows(seqs: list[Sequence | SequenceAhead]) -> np.ndarray:
    """Return the rows [num_seqs, 5] float32 that `ingine.engine.kernels.sampling.cuda.choose` reads."""
    return device_sampling.pack_params([seq.params for seq in seqs], _uniforms(seqs))


def _process(
    logits: Tensor,
    seqs: list[Sequence | SequenceAhead],
    sampling: Sampling,
    pending: Tensor | None,
    masks: StepMasks | None,
) -> Tensor:
    logits = process(logits, seqs, pending)
    if masks is not None:
        logits = logits.contiguous()
        sampling.mask(logits, masks.rows, masks.masks)
    return logits


def _choose(logits: Tensor, seqs: list[Sequence | SequenceAhead], sampling: Sampling) -> Tensor:
    return sampling.choose(logits, [seq.params for seq in seqs], _uniforms(seqs))


def _uniforms(seqs: list[Sequence | SequenceAhead]) -> np.ndarray:
    return uniforms(
        [seq.seed for seq in seqs], [seq.num_output_tokens + seq.num_pending_tokens for seq in seqs]
    )
