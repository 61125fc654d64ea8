"""Log probabilities of the chosen token and of the likeliest tokens: the reference in torch."""

from torch import Tensor


def logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return, for logits [num_rows, vocab_size]: the log probabilities of `token_ids` [num_rows] int64, NaN
    for -1; their ranks [num_rows] int64, which are the numbers of tokens that are at least as likely, 0 for
    -1; the ids [num_rows, num_top] of the likeliest tokens, likeliest first; and their log probabilities.

    For every device; `ingine.engine.kernels.native.sampling` implements it for the CPU.
    """
    of_all = logits.float().log_softmax(dim=-1)
    columns, is_missing = token_ids.clamp(min=0)[:, None], token_ids < 0
    chosen = of_all.gather(1, columns).squeeze(1).masked_fill(is_missing, float("nan"))
    # By logits, since log probabilities of different tokens may round to one number.
    ranks = (logits >= logits.gather(1, columns)).sum(dim=-1).masked_fill(is_missing, 0)
    top = of_all.topk(num_top, dim=-1)
    return chosen, ranks, top.indices, top.values
