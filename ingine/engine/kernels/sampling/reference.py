"""Chooses one token for each row: the likeliest, or one drawn from those that min_p, top_k and top_p leave.

The draw is by inverse CDF, in the order of the token ids; in a row with a cut, in the order of the logits,
the lowest id first among equal ones. This is the definition, in torch and for every device;
`ingine.engine.kernels.native.sampling` does the same faster on the CPU.
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from ingine.sampling_params import SamplingParams

CANDIDATE_WIDTHS = (256, 4096)
"""Numbers of likeliest tokens that are sorted for top_k, top_p and min_p, before the whole vocabulary is."""

MIN_TEMPERATURE = 1e-5
"""A lower temperature would divide logits out of float32's range, and is greedy in effect."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def uniforms(seeds: Iterable[int], positions: Iterable[int]) -> np.ndarray:
    """Return a float32 in [0, 1) for each (seed, position), the same on every platform.

    The numbers are SplitMix64 (Steele, Lea and Flood 2014) used as a counter-based hash, computed on the
    host, where seeds and positions are.
    """
    with np.errstate(over="ignore"):  # wrapping is intended; numpy warns of it only for a single number
        streams = _mix(np.array(seeds, dtype=np.uint64) + _GOLDEN)
        bits = _mix(streams + (np.array(positions, dtype=np.uint64) + np.uint64(1)) * _GOLDEN)
    return (bits >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def divisor_of(params: SamplingParams) -> float:
    """Return the number that a row's logits are divided by; 0 for a greedy row."""
    return 0.0 if params.greedy else max(params.temperature, MIN_TEMPERATURE)


def choose(logits: Tensor, params: list[SamplingParams], uniform: np.ndarray) -> Tensor:
    """Return token ids [num_rows] int64 for logits [num_rows, vocab_size]; -1 if the largest is not finite.

    A greedy row takes its likeliest token; another draws with its number of `uniform` [num_rows], in [0, 1).
    For every device and dtype. A row's token depends only on that row.
    """
    values, token_ids = logits.max(dim=-1)  # propagates NaN
    is_finite = values.isfinite()
    rows = [row for row, p in enumerate(params) if not p.greedy]
    if rows:
        random = logits if len(rows) == len(params) else logits[rows]
        token_ids[rows] = _draw(random.float(), [params[row] for row in rows], uniform[rows])
    return token_ids.where(is_finite, -1)


def _draw(logits: Tensor, params: list[SamplingParams], uniform: np.ndarray) -> Tensor:
    """Draw a token for each row of float32 logits; none is greedy. A row of NaN gives an arbitrary token."""
    device = logits.device
    temperature = np.array([divisor_of(p) for p in params], dtype=np.float32)
    # Subtract the largest logit before the division: rounding errors are then smallest for likely tokens.
    below = logits - logits.amax(dim=-1, keepdim=True)
    probs = torch.softmax(below.div_(torch.from_numpy(temperature).to(device)[:, None]), dim=-1)
    numbers = torch.from_numpy(uniform).to(device)[:, None]

    limits = np.array([(min(p.top_k, logits.shape[1]), p.top_p, p.min_p) for p in params], dtype=np.float32)
    # Compare the rounded numbers, which are used to cut: a top_p that rounds to 1 keeps all.
    is_cut = (limits[:, 0] > 0) | (limits[:, 1] < 1) | (limits[:, 2] > 0)
    if not is_cut.any():
        return _inverse_cdf(probs, numbers)
    if is_cut.all():
        return _draw_truncated(logits, probs, limits, numbers)
    token_ids = torch.empty(len(params), dtype=torch.int64, device=device)
    cut, whole = np.flatnonzero(is_cut).tolist(), np.flatnonzero(~is_cut).tolist()
    token_ids[whole] = _inverse_cdf(probs[whole], numbers[whole])
    token_ids[cut] = _draw_truncated(logits[cut], probs[cut], limits[cut], numbers[cut])
    return token_ids


def _inverse_cdf(weights: Tensor, uniform: Tensor) -> Tensor:
    """Return the index of each row's first cumulative weight over uniform * sum, never one of weight 0."""
    cdf = weights.cumsum(dim=-1)
    total = cdf[:, -1:].contiguous()
    index = torch.searchsorted(cdf, uniform * total, right=True)
    # Rounding can make the product equal to the sum: take the last index with a weight then.
    return torch.minimum(index, torch.searchsorted(cdf, total)).squeeze(1)


def _draw_truncated(logits: Tensor, probs: Tensor, limits: np.ndarray, uniform: Tensor) -> Tensor:
    """Draw from the tokens that top_k (0 keeps all), top_p and min_p keep: `limits` [num_rows, 3] float32.

    Only as many of the likeliest tokens are sorted as include all that are kept. That number depends on the
    row alone, so a row's draw does not depend on its batch.
    """
    vocab_size = probs.shape[1]
    order = _ordinals(logits)
    top_k, top_p, min_p = torch.from_numpy(limits).to(probs.device)[:, :, None].unbind(1)
    top_k = top_k.where(top_k > 0, vocab_size)
    floor = min_p * probs.amax(dim=-1, keepdim=True)
    mass = torch.ones_like(floor)
    if limits[:, 2].any():
        # It stays exactly 1 for rows without min_p: a draw does not depend on the parameters of other rows.
        mass = torch.where(min_p > 0, probs.where(probs >= floor, 0).sum(dim=-1, keepdim=True), mass)

    token_ids = torch.zeros(len(probs), dtype=torch.int64, device=probs.device)
    rows = torch.arange(len(probs), device=probs.device)
    per_row = (top_k, top_p, floor, mass)
    for width in (*CANDIDATE_WIDTHS, vocab_size):
        ordinals = order.topk(min(width, vocab_size)).values
        columns = vocab_size - 1 - (ordinals & 0xFFFFFFFF)
        candidates = probs.gather(1, columns)
        kept, complete = _truncate(candidates, vocab_size, *per_row)
        chosen = columns.gather(1, _inverse_cdf(kept, uniform)[:, None]).squeeze(1)
        token_ids[rows[complete]] = chosen[complete]
        if complete.all():
            break
        rows, order, probs, uniform, *per_row = (
            t[~complete] for t in (rows, order, probs, uniform, *per_row)
        )
    return token_ids


def _ordinals(logits: Tensor) -> Tensor:
    """Return int64 numbers for logits [num_rows, vocab_size] float32 that order a row by its logits and,
    among equal ones, which are frequent in bfloat16, by token id. The lowest id has the largest number.
    """
    bits = (logits + 0.0).view(torch.int32)  # -0 becomes 0
    bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    descending_ids = torch.arange(logits.shape[1] - 1, -1, -1, device=logits.device)
    return (bits.long() << 32) + descending_ids


def _truncate(
    candidates: Tensor, vocab_size: int, top_k: Tensor, top_p: Tensor, floor: Tensor, mass: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the candidates [num_rows, width], likeliest first, with 0 for those cut off; and [num_rows],
    whether the candidates include all tokens of the row that are kept. `mass` [num_rows, 1] is the sum of all
    probabilities of at least `floor`.
    """
    width = candidates.shape[1]
    rank = torch.arange(width, device=candidates.device)
    kept = candidates.where((rank < top_k) & (candidates >= floor), 0)
    cdf = kept.cumsum(dim=-1)
    # min_p and top_k keep no token beyond the candidates; or top_p keeps none of those that they keep.
    bounded = (top_k <= width) | (kept[:, -1:] == 0)
    covered = (top_k >= vocab_size) & (top_p < 1) & (cdf[:, -1:] >= top_p * mass)
    nucleus = top_p * torch.where(bounded, cdf[:, -1:], mass)
    kept = kept.where((top_p >= 1) | (cdf - kept < nucleus), 0)
    return kept, (bounded | covered).squeeze(1)
