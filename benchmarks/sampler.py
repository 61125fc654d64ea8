"""What sampling costs a step, for 32 sequences over SmolLM2's vocabulary: `python benchmarks/sampler.py`."""

import time

import torch

from ingine.sampler import sample
from ingine.sampling_params import SamplingParams
from ingine.sequence import Sequence

NUM_SEQS, VOCAB_SIZE, NUM_TOKENS, NUM_STEPS = 32, 49152, 200, 20
KINDS = {
    "greedy": SamplingParams(temperature=0),
    "temperature": SamplingParams(),
    "top_k 50": SamplingParams(top_k=50),
    "top_p 0.9": SamplingParams(top_p=0.9),
    "top_p 0.9, temperature 3": SamplingParams(top_p=0.9, temperature=3),
    "min_p 0.05": SamplingParams(min_p=0.05),
    "greedy, all penalties": SamplingParams(
        temperature=0, repetition_penalty=1.1, presence_penalty=0.5, frequency_penalty=0.5
    ),
    "top_p 0.9, all penalties": SamplingParams(
        top_p=0.9, repetition_penalty=1.1, presence_penalty=0.5, frequency_penalty=0.5
    ),
    "greedy, 5 logprobs": SamplingParams(temperature=0, logprobs=5),
}


def step_ms(params: SamplingParams, logits: torch.Tensor) -> float:
    """The best of `NUM_STEPS`: other work on the machine only ever adds."""
    params = params.model_copy(update={"max_tokens": NUM_TOKENS + 1})
    seqs = [
        Sequence(
            str(index),
            range(index, index + NUM_TOKENS),
            params,
            seed=index,
            sort_key=(0, index),
            max_num_tokens=VOCAB_SIZE,
            output_token_ids=range(NUM_TOKENS),
        )
        for index in range(NUM_SEQS)
    ]
    times = []
    for _ in range(NUM_STEPS):
        own = logits.clone()
        started = time.perf_counter()
        sample(own, seqs)
        times.append(time.perf_counter() - started)
    return 1e3 * min(times)


def main() -> None:
    # Like a language model's: most of the mass on few tokens, the rest spread over all of them.
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(NUM_SEQS, VOCAB_SIZE, generator=generator) * 2
    logits[:, :200] += torch.linspace(12, 4, 200)
    print(f"{NUM_SEQS} sequences, vocabulary of {VOCAB_SIZE}, {torch.get_num_threads()} threads: ms a step")
    for name, params in KINDS.items():
        print(f"{name:28} {step_ms(params, logits):7.2f}")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
