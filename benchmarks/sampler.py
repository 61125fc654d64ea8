"""Measures the sampling of a step, by its kernels and in torch, in turns: `python benchmarks/sampler.py`.
With `--device cuda` it runs on a GPU.

Sampling goes from logits in bfloat16, as the model computes them, to a list of tokens. The logits are
synthetic, but shaped like a language model's: few tokens have most of the mass.

On a GPU the figure is for a step without a CUDA graph, and includes packing the parameters, copying them to
the GPU and the launches. Replayed decode steps have the same kernels in their graph and nothing else; the
cost of the kernels alone is not measured here.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch

from ingine.engine.kernels.sampling.interface import TORCH_SAMPLING, Sampling
from ingine.engine.kernels.select import select_kernels
from ingine.engine.request import EngineRequest
from ingine.engine.sample import sampler
from ingine.engine.schedule.sequence import Sequence
from ingine.sampling_params import SamplingParams

VOCAB_SIZE, NUM_TOKENS = 49152, 200
PENALTIES = {"repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.5}
KINDS = {
    "greedy": SamplingParams(temperature=0),
    "temperature 0.8": SamplingParams(temperature=0.8),
    "top_k 50": SamplingParams(top_k=50),
    "top_p 0.9": SamplingParams(top_p=0.9),
    "top_p 0.9, temperature 0.8": SamplingParams(top_p=0.9, temperature=0.8),
    "top_p 0.9, temperature 3": SamplingParams(top_p=0.9, temperature=3),
    "min_p 0.05": SamplingParams(min_p=0.05),
    "greedy, all penalties": SamplingParams(temperature=0, **PENALTIES),
    "top_p 0.9, all penalties": SamplingParams(top_p=0.9, **PENALTIES),
    "greedy, 5 logprobs": SamplingParams(temperature=0, logprobs=5),
    "temperature 0.8, bias": SamplingParams(temperature=0.8, logit_bias={7: 1.0}),
    "temperature 0.8, 256 bad words": SamplingParams(temperature=0.8, bad_words=("see BAD_WORDS",)),
    "temperature 0.8, 4096 allowed": SamplingParams(temperature=0.8, allowed_token_ids=tuple(range(4096))),
}
BAD_WORDS = [[1000 + 3 * word, 1001 + 3 * word, 1002 + 3 * word][: 1 + word % 3] for word in range(256)]
"""Token ids of words of one to three tokens."""


def make_logits(num_rows: int, device: torch.device) -> torch.Tensor:
    logits = torch.randn(num_rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(0)) * 2
    logits[:, :200] += torch.linspace(12, 4, 200)
    return logits.bfloat16().to(device)


def make_sequences(params: SamplingParams, num_seqs: int) -> list[Sequence]:
    params = params.model_copy(update={"max_tokens": NUM_TOKENS + 1})
    return [
        Sequence(
            EngineRequest(
                str(index),
                range(index, index + NUM_TOKENS),
                params,
                output_token_ids=range(NUM_TOKENS),
                bad_words_token_ids=BAD_WORDS if params.bad_words else (),
            ),
            seed=index,
            sort_key=(0, index),
            max_num_tokens=VOCAB_SIZE,
        )
        for index in range(num_seqs)
    ]


def sample(logits: torch.Tensor, seqs: list[Sequence], sampling: Sampling) -> None:
    sampler.sample(logits, seqs, sampling).wait()


def best_ms(calls: list[Callable[[], object]], num_rounds: int) -> list[float]:
    """The minimum time of each call in `num_rounds` turns: other work on the machine can only add time."""
    best = [float("inf")] * len(calls)
    for _ in range(num_rounds):
        for index, call in enumerate(calls):
            started = time.perf_counter()
            call()
            best[index] = min(best[index], time.perf_counter() - started)
    return [1e3 * seconds for seconds in best]


def main(all_num_seqs: list[int], num_rounds: int, device: torch.device) -> None:
    is_cuda = device.type == "cuda"
    machine = torch.cuda.get_device_name(device) if is_cuda else f"{torch.get_num_threads()} threads"
    selected = select_kernels(device, torch.bfloat16).sampling
    print(f"vocabulary of {VOCAB_SIZE}, {machine}, least of {num_rounds}: ms a step")
    for num_seqs in all_num_seqs:
        print(f"\n{num_seqs:3} sequences{selected.name:>28}     torch")
        logits = make_logits(num_seqs, device)
        for name, params in KINDS.items():
            seqs = make_sequences(params, num_seqs)
            calls = [partial(sample, logits, seqs, sampling) for sampling in (selected, TORCH_SAMPLING)]
            print(f"{name:32}" + "".join(f"{ms:10.2f}" for ms in best_ms(calls, num_rounds)), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seqs", type=int, nargs="+", default=[32, 128, 256])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", type=torch.device, default="cpu")
    args = parser.parse_args()
    with torch.inference_mode():
        main(args.seqs, args.rounds, args.device)
