"""From logits to the next token of every sequence of a batch.

The order of operations is vLLM's:

1. The log probabilities that are reported are those of the model's own logits.
2. `min_tokens` masks what would end a sequence, `logit_bias` is added.
3. Penalties: repetition (prompt and output), then frequency and presence (output).
4. Greedy takes the largest logit. Else temperature, min_p, top_k and top_p, each on what the one before
   left, then one draw by inverse CDF with the uniform number that belongs to (seed, position).

Choosing and log probabilities have two implementations, torch's and native; which serves is said by the
device and dtype of each step's logits, not chosen with the model as `ingine.kernels` is.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ingine import random_sampling
from ingine.logits_processors import process
from ingine.logprobs import logprobs as torch_logprobs
from ingine.native import sampling as native
from ingine.random_sampling import uniforms
from ingine.sampling_params import SamplingParams
from ingine.sequence import Sequence, SequenceAhead


class SampledToken(NamedTuple):
    token_id: int | None
    """None: there is no finite largest logit, so nothing to choose."""
    logprobs: dict | None
    """{token_id, logprob, top: [[token_id, logprob], ...]}, where the sequence asks for it."""


class _Functions(NamedTuple):
    choose: Callable[[Tensor, list[SamplingParams], np.ndarray], Tensor]
    logprobs: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor]]


_TORCH = _Functions(random_sampling.choose, torch_logprobs)
_NATIVE = _Functions(native.choose, native.logprobs)


def sample(logits: Tensor, seqs: list[Sequence | SequenceAhead]) -> list[SampledToken]:
    """The next token of each of `seqs`, from logits [num_seqs, vocab_size], which may be overwritten."""
    if all(seq.is_plain_greedy for seq in seqs):
        token_ids, logprobs = _choose(logits, seqs).tolist(), {}
    else:
        wanted = [row for row, seq in enumerate(seqs) if seq.params.logprobs is not None]
        model_logits = logits[wanted]  # a copy: the rest works in place
        token_ids = _choose(process(logits, seqs), seqs).tolist()
        reports = _logprobs(model_logits, [(seqs[row], token_ids[row]) for row in wanted])
        logprobs = dict(zip(wanted, reports, strict=True))
    return [
        SampledToken(token_id if token_id >= 0 else None, logprobs.get(row))
        for row, token_id in enumerate(token_ids)
    ]


def _functions_for(logits: Tensor) -> _Functions:
    return _NATIVE if native.supports(logits) else _TORCH


def _choose(logits: Tensor, seqs: list[Sequence | SequenceAhead]) -> Tensor:
    uniform = uniforms([seq.seed for seq in seqs], [seq.num_output_tokens for seq in seqs])
    return _functions_for(logits).choose(logits, [seq.params for seq in seqs], uniform)


def _logprobs(logits: Tensor, chosen: list[tuple[Sequence | SequenceAhead, int]]) -> list[dict]:
    """One a row of `logits`, the model's own, for the token that was chosen from it."""
    if not chosen:
        return []
    logprobs = _functions_for(logits).logprobs
    num_top = max(seq.params.logprobs for seq, _ in chosen)
    token_ids = torch.tensor([token_id for _, token_id in chosen], device=logits.device)
    rows = zip(*(values.tolist() for values in logprobs(logits, token_ids, num_top)), strict=True)
    reports = []
    for (seq, token_id), (logprob, top_ids, top) in zip(chosen, rows, strict=True):
        pairs = [[top_id, value] for top_id, value in zip(top_ids, top, strict=True) if value > -math.inf]
        reports.append({"token_id": token_id, "logprob": logprob, "top": pairs[: seq.params.logprobs]})
    return reports
