"""Compares sampling on the device with `kernels.sampling.reference`: equal numbers give equal
tokens."""

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu_check.cells import Cells, Figures
from benchmarks.gpu_check.device import name_of
from benchmarks.gpu_check.plan import Plan
from ingine.engine.kernels.sampling import cuda as device_sampling
from ingine.engine.kernels.sampling import reference as random_sampling
from ingine.sampling_params import SamplingParams

EDGE = 4e-6
"""Distance of a uniform number or a top_p from a token's edge within which rounding may choose another token:
the order of a float32 sum over a vocabulary changes it."""

GREEDY = SamplingParams(temperature=0)
KINDS: dict[str, dict] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.8},
    "hot": {"temperature": 4.0},
    "top_k": {"top_k": 50},
    "a large top_k": {"top_k": 5000},
    "top_p": {"top_p": 0.9},
    "a top_p that keeps nearly all": {"temperature": 3.0, "top_p": 0.999},
    "min_p": {"min_p": 0.05},
    "all three": {"temperature": 0.9, "top_k": 40, "top_p": 0.9, "min_p": 0.01},
}


def run(plan: Plan, device: torch.device, cells: Cells) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        settings = {"dtype": name_of(dtype), "vocab_size": plan.vocab_size}
        cells.run("sampling", settings, _check, dtype, plan, device)


def _check(dtype: torch.dtype, plan: Plan, device: torch.device) -> Figures:
    """Check all kinds in one batch. In bfloat16 many logits are equal, and the lowest id goes first."""
    generator = torch.Generator(device).manual_seed(0)
    kinds = [SamplingParams(**kind) for kind in KINDS.values()]
    params = [kinds[row % len(kinds)] for row in range(max(plan.num_rows, len(kinds)))]
    logits = 3 * torch.randn(len(params), plan.vocab_size, generator=generator, device=device)
    logits = logits.to(dtype)
    logits[-1, plan.vocab_size // 2] = torch.nan  # a row without a token
    uniform = np.random.default_rng(0).random(len(params), dtype=np.float32)

    expected = random_sampling.choose(logits.clone(), params, uniform)
    rows = torch.from_numpy(device_sampling.pack_params(params, uniform)).to(device)
    found = device_sampling.choose(logits.clone(), rows)
    different = (found != expected).nonzero().flatten().tolist()
    at_an_edge = [
        row
        for row in different
        if _is_at_an_edge(logits[row], params[row], uniform[row].item(), found[row].item())
    ]
    likeliest = random_sampling.choose(logits.clone(), [GREEDY] * len(params), uniform)
    greedy_is_right = torch.equal(device_sampling.greedy(logits.clone()), likeliest)
    return {
        "num_rows": len(params),
        "num_different": len(different),
        "num_at_an_edge": len(at_an_edge),
        "greedy_is_right": greedy_is_right,
        "ok": len(at_an_edge) == len(different) and greedy_is_right,
    }


def _is_at_an_edge(logits: Tensor, params: SamplingParams, uniform: float, found: int) -> bool:
    """True if, in float64, a number within `EDGE` of `uniform` and a top_p within `EDGE` of the requested one
    may draw `found`. Several tokens can qualify: in a flat distribution many are smaller than that.
    """
    if params.greedy or found < 0 or not logits.max().isfinite():
        return False
    token_ids = torch.arange(len(logits), device=logits.device)
    if params.top_k > 0 or params.top_p < 1 or params.min_p > 0:
        token_ids = logits.sort(descending=True, stable=True).indices
    probs = (logits.double() / params.temperature).softmax(dim=0)[token_ids]
    if params.top_k > 0:
        probs[params.top_k :] = 0
    probs = probs.where(probs >= params.min_p * probs.max(), 0)
    rank = token_ids.tolist().index(found)
    offsets = (-EDGE, 0.0, EDGE) if params.top_p < 1 else (0.0,)
    for top_p in (params.top_p + offset for offset in offsets):
        cdf = probs.cumsum(dim=0)
        kept = probs.where(cdf - probs < top_p * cdf[-1], 0)
        cdf = kept.cumsum(dim=0) / kept.sum()
        upper, weight = cdf[rank].item(), (kept[rank] / kept.sum()).item()
        if weight > 0 and upper - weight <= uniform + EDGE and uniform - EDGE <= upper:
            return True
    return False
