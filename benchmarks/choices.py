"""Compares one request of 8 choices with 8 requests of one: `python benchmarks/choices.py`.

Both generate the same tokens of a prompt of 400 tokens. Each kind runs once in each round, in turns, with a
first token that no earlier prompt had, so that its prefix is not cached. The figures are tokens computed,
the seconds of the prompt (until every sequence has a token) and of the whole, and the processor time of the
whole; medians of the rounds.
"""

import argparse
import random
import time
from dataclasses import dataclass
from statistics import median

from ingine.engine.config import EngineConfig
from ingine.engine.engine import Engine
from ingine.engine.request import EngineRequest
from ingine.engine.store.model_store import DEFAULT_MODEL
from ingine.sampling_params import SamplingParams

NUM_CHOICES, NUM_PROMPT_TOKENS, NUM_OUTPUT_TOKENS, NUM_ROUNDS = 8, 400, 32, 5
KV_BYTES = 256 << 20


@dataclass
class Figures:
    num_computed: int = 0
    prompt_s: float = 0.0
    whole_s: float = 0.0
    cpu_s: float = 0.0
    outputs: dict[int, list[int]] | None = None


def requests(prompt: list[int], seed: int, *, as_choices: bool) -> list[EngineRequest]:
    common = {"temperature": 1.0, "max_tokens": NUM_OUTPUT_TOKENS, "ignore_eos": True}
    if as_choices:
        return [EngineRequest("0", prompt, SamplingParams(n=NUM_CHOICES, seed=seed, **common))]
    return [
        EngineRequest(str(index), prompt, SamplingParams(seed=seed + index, **common))
        for index in range(NUM_CHOICES)
    ]


def run(engine: Engine, added: list[EngineRequest]) -> Figures:
    figures, forward = Figures(outputs={}), engine._runner.forward

    def counted(batch):
        figures.num_computed += sum(batch.num_tokens)
        return forward(batch)

    engine._runner.forward = counted
    began, cpu_began = time.perf_counter(), time.process_time()
    for request in added:
        engine.add(request)
    while engine.has_unfinished:
        for output in engine.step():
            index = output.index or int(output.seq_id)
            figures.outputs.setdefault(index, []).extend(output.token_ids)
        if not figures.prompt_s and len(figures.outputs) == NUM_CHOICES:
            figures.prompt_s = time.perf_counter() - began
    figures.whole_s, figures.cpu_s = time.perf_counter() - began, time.process_time() - cpu_began
    engine._runner.forward = forward
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--rounds", type=int, default=NUM_ROUNDS)
    options = parser.parse_args()
    engines = {
        caching: Engine(EngineConfig(options.model, enable_prefix_caching=caching, kv_cache_bytes=KV_BYTES))
        for caching in (True, False)
    }
    print(f"{engines[True].numerics}, {engines[True].config.max_num_batched_tokens} tokens in a step at most")
    kinds = [(as_choices, caching) for caching in (True, False) for as_choices in (True, False)]
    found: dict[tuple[bool, bool], list[Figures]] = {kind: [] for kind in kinds}
    dice = random.Random(0)
    for engine in engines.values():
        run(engine, [EngineRequest("0", list(range(500, 520)), SamplingParams(max_tokens=2))])  # to warm up
    for number in range(options.rounds):
        outputs = []
        for as_choices, caching in kinds:
            prompt = [number * len(kinds) + len(outputs) + 1000]
            prompt += [dice.randrange(1000, 40_000) for _ in range(NUM_PROMPT_TOKENS - 1)]
            figures = run(engines[caching], requests(prompt, number, as_choices=as_choices))
            outputs.append(figures.outputs)
            found[as_choices, caching].append(figures)
    print("| | prefix caching | tokens computed | prompt, s | whole, s | processor, s |")
    print("| --- | --- | --- | --- | --- | --- |")
    for (as_choices, caching), rounds in found.items():
        name = f"1 request of {NUM_CHOICES}" if as_choices else f"{NUM_CHOICES} requests of 1"
        times = [
            f"{median(getattr(each, part) for each in rounds):.2f}"
            for part in ("prompt_s", "whole_s", "cpu_s")
        ]
        num_computed = median(each.num_computed for each in rounds)
        print(f"| {name} | {'yes' if caching else 'no'} | {num_computed:.0f} | {' | '.join(times)} |")


if __name__ == "__main__":
    main()
