"""Two small runs of the engine, with a step trace. docs/learn/step-trace.md explains each line.

    python examples/step_trace.py

Prompts are token ids and outputs have fixed lengths, so the schedule is the same on every machine.
"""

import logging
import sys

from ingine import SamplingParams
from ingine.engine.config import EngineConfig
from ingine.engine.engine import Engine
from ingine.engine.request import EngineRequest

BLOCK_SIZE = 16
KV_BYTES_PER_TOKEN = 2 * 30 * 3 * 64 * 4
"""SmolLM2-135M in float32: keys and values, 30 layers, 3 heads of 64 numbers, 4 bytes each."""

LONG = list(range(200, 240))
FOUR_SEQUENCES = [
    ("a", list(range(100, 120)), 10),
    ("b", LONG, 6),
    ("c", list(range(300, 312)), 4),
    ("d", LONG[:36] + list(range(400, 404)), 3),  # has the first 36 tokens of b
]
TOO_LITTLE_MEMORY = [("a", list(range(100, 130)), 8), ("b", list(range(200, 230)), 6)]
"""Name, prompt, and number of output tokens of each sequence."""


def run(sequences: list[tuple[str, list[int], int]], num_blocks: int) -> None:
    engine = Engine(
        EngineConfig(
            "smollm2",
            device="cpu",
            dtype="float32",
            max_num_seqs=3,
            max_num_batched_tokens=24,
            block_size=BLOCK_SIZE,
            kv_cache_bytes=num_blocks * BLOCK_SIZE * KV_BYTES_PER_TOKEN,
        )
    )
    for name, prompt_token_ids, max_tokens in sequences:
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        engine.add(EngineRequest(name, prompt_token_ids, params))
    while engine.has_unfinished:
        engine.step()


def main() -> None:
    trace = logging.getLogger("ingine.engine.engine")
    trace.addHandler(logging.StreamHandler(sys.stdout))
    trace.setLevel(logging.DEBUG)
    print("four sequences, 8 blocks")
    run(FOUR_SEQUENCES, num_blocks=8)
    print("two sequences, 5 blocks")
    run(TOO_LITTLE_MEMORY, num_blocks=5)


if __name__ == "__main__":
    main()
