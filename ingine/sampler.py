"""From logits to the next token of every sequence of a batch.

The order of operations is vLLM's:

1. The log probabilities that are reported are those of the model's own logits.
2. `min_tokens` masks what would end a sequence, `logit_bias` is added.
3. Penalties: repetition (prompt and output), then frequency and presence (output).
4. Greedy takes the largest logit. Else temperature, min_p, top_k and top_p, each on what the one before
   left, then one draw by inverse CDF with the uniform number that belongs to (seed, position).

Choosing and log probabilities have implementations for CUDA and the CPU beside the reference in torch;
which serves is said by the device and dtype of each step's logits, not chosen with the model as
`ingine.kernels` is.
"""

import math
from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
from torch import Tensor

from ingine import device_sampling, random_sampling
from ingine.logits_processors import process
from ingine.logprobs import logprobs as torch_logprobs
from ingine.native import sampling as native
from ingine.random_sampling import uniforms
from ingine.sampling_params import SamplingParams
from ingine.sequence import Sequence, SequenceAhead
from ingine.transfer import HostCopy, to_device


class SampledToken(NamedTuple):
    token_id: int | None
    """None: there is no finite largest logit, so nothing to choose."""
    logprobs: dict | None
    """{token_id, logprob, top: [[token_id, logprob], ...]}, where the sequence asks for it."""


class Sampled:
    """The tokens of a batch, on their way to the host."""

    def __init__(self, token_ids: Tensor, reports: "_Reports | None" = None):
        """token_ids: [num_rows] int64, -1 where there was nothing to choose."""
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
    """Log probabilities of those rows of a batch that want them."""

    rows: list[int]
    num_top: list[int]
    values: tuple[Tensor, Tensor, Tensor]
    """What `ingine.logprobs.logprobs` gives for these rows."""

    def read(self, token_ids: list[int], values: list[list]) -> dict[int, dict]:
        """By row, from `values` on the host."""
        found = {}
        for row, num_top, logprob, top_ids, top in zip(self.rows, self.num_top, *values, strict=True):
            pairs = [[top_id, value] for top_id, value in zip(top_ids, top, strict=True) if value > -math.inf]
            found[row] = {"token_id": token_ids[row], "logprob": logprob, "top": pairs[:num_top]}
        return found


class _Functions(NamedTuple):
    choose: Callable[[Tensor, list[SamplingParams], np.ndarray], Tensor]
    logprobs: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor]]


def sample(logits: Tensor, seqs: list[Sequence | SequenceAhead], *, pending: Tensor | None = None) -> Sampled:
    """The next token of each of `seqs`, from logits [num_seqs, vocab_size], which may be overwritten.

    pending: [num_seqs] int64, the token that a sequence has got and the host does not know, -1 for none.
    """
    if all(seq.is_plain and seq.params.greedy for seq in seqs):
        return Sampled(_choose(logits, seqs))
    wanted = [row for row, seq in enumerate(seqs) if seq.params.logprobs is not None]
    if not wanted:
        return Sampled(_choose(process(logits, seqs, pending), seqs))
    rows = to_device(np.array(wanted), logits.device)
    model_logits = logits.index_select(0, rows)  # a copy: the rest works in place
    token_ids = _choose(process(logits, seqs, pending), seqs)
    num_top = [seqs[row].params.logprobs for row in wanted]
    values = _functions_for(logits).logprobs(model_logits, token_ids.index_select(0, rows), max(num_top))
    return Sampled(token_ids, _Reports(wanted, num_top, values))


def sampling_rows(seqs: list[Sequence | SequenceAhead]) -> np.ndarray:
    """[num_seqs, 5] float32 for `ingine.device_sampling.choose`."""
    return device_sampling.pack_params([seq.params for seq in seqs], _uniforms(seqs))


def _choose(logits: Tensor, seqs: list[Sequence | SequenceAhead]) -> Tensor:
    return _functions_for(logits).choose(logits, [seq.params for seq in seqs], _uniforms(seqs))


def _uniforms(seqs: list[Sequence | SequenceAhead]) -> np.ndarray:
    return uniforms(
        [seq.seed for seq in seqs], [seq.num_output_tokens + seq.num_pending_tokens for seq in seqs]
    )


def _choose_on_device(logits: Tensor, params: list[SamplingParams], uniform: np.ndarray) -> Tensor:
    if all(p.greedy for p in params):
        return device_sampling.greedy(logits)
    rows = device_sampling.pack_params(params, uniform)
    return device_sampling.choose(logits, to_device(rows, logits.device))


_TORCH = _Functions(random_sampling.choose, torch_logprobs)
_NATIVE = _Functions(native.choose, native.logprobs)
_CUDA = _Functions(_choose_on_device, torch_logprobs)


def _functions_for(logits: Tensor) -> _Functions:
    if logits.is_cuda and find_spec("triton"):
        return _CUDA
    return _NATIVE if native.supports(logits) else _TORCH
