"""From logits to the next token of every sequence of a batch.

The order of operations is vLLM's:

1. The log probabilities that are reported are those of the model's own logits.
2. `min_tokens` masks what would end a sequence, `logit_bias` is added.
3. Penalties: repetition (prompt and output), then frequency and presence (output).
4. Greedy takes the largest logit. Else temperature, min_p, top_k and top_p, each on what the one before
   left, then one draw by inverse CDF with the uniform number that belongs to (seed, position).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ingine.logits_processors import add_bias, mask_ends, penalise
from ingine.random_sampling import draw, uniforms
from ingine.sequence import Sequence, SequenceAhead


class SampledToken(NamedTuple):
    token_id: int | None
    """None: there is no finite largest logit, so nothing to choose."""
    logprobs: dict | None
    """{token_id, logprob, top: [[token_id, logprob], ...]}, where the sequence asks for it."""


def sample(logits: Tensor, seqs: list[Sequence | SequenceAhead]) -> list[SampledToken]:
    """The next token of each of `seqs`, from logits [num_seqs, vocab_size] float32, which are overwritten."""
    if all(seq.is_plain_greedy for seq in seqs):
        token_ids, logprobs = _likeliest(logits).tolist(), {}
    else:
        wanted = [row for row, seq in enumerate(seqs) if seq.params.logprobs is not None]
        model_logits = logits[wanted]  # a copy: the rest works in place
        mask_ends(logits, seqs)
        add_bias(logits, seqs)
        penalise(logits, seqs)
        token_ids = _choose(logits, seqs).tolist()
        reports = _logprobs(model_logits, [(seqs[row], token_ids[row]) for row in wanted])
        logprobs = dict(zip(wanted, reports, strict=True))
    return [
        SampledToken(token_id if token_id >= 0 else None, logprobs.get(row))
        for row, token_id in enumerate(token_ids)
    ]


def _likeliest(logits: Tensor) -> Tensor:
    """[num_seqs] token ids, -1 where the largest logit is NaN or infinite (max propagates NaN)."""
    values, token_ids = logits.max(dim=-1)
    return token_ids.where(values.isfinite(), -1)


def _choose(logits: Tensor, seqs: list[Sequence | SequenceAhead]) -> Tensor:
    token_ids = _likeliest(logits)
    rows = [row for row, seq in enumerate(seqs) if not seq.params.greedy]
    if not rows:
        return token_ids
    random = [seqs[row] for row in rows]
    uniform = uniforms([seq.seed for seq in random], [seq.num_output_tokens for seq in random])
    drawn = draw(logits if len(rows) == len(seqs) else logits[rows], [seq.params for seq in random], uniform)
    token_ids[rows] = drawn.where(token_ids[rows] >= 0, -1)
    return token_ids


def _logprobs(logits: Tensor, chosen: list[tuple[Sequence | SequenceAhead, int]]) -> list[dict]:
    """One a row of `logits`, the model's own, for the token that was chosen from it."""
    if not chosen:
        return []
    num_top = max(seq.params.logprobs for seq, _ in chosen)
    logprobs = logits.log_softmax(dim=-1)
    ids = torch.tensor([[max(token_id, 0)] for _, token_id in chosen], device=logits.device)
    of_chosen = logprobs.gather(1, ids).squeeze(1).tolist()
    values, ids = (top.tolist() for top in logprobs.topk(num_top, dim=-1))
    tops = [[list(pair) for pair in zip(*row, strict=True)] for row in zip(ids, values, strict=True)]
    return [
        {"token_id": token_id, "logprob": logprob, "top": top[: seq.params.logprobs]}
        for (seq, token_id), logprob, top in zip(chosen, of_chosen, tops, strict=True)
    ]
