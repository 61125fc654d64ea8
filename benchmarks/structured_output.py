"""Measures what a grammar costs a batch, and what the tokens that it forces save: a step of constrained
sequences and a step of as many free ones in turns, with the same prompts: `python
benchmarks/structured_output.py`.

Prefill is not in the figures, nor is the compilation of the grammar. A cost above that of the machine's noise
shows in processor time too; for that run it with OMP_WAIT_POLICY=PASSIVE, else threads that wait count as
well.
"""

import argparse
import time
from statistics import median

from ingine.engine.config import EngineConfig
from ingine.engine.engine import Engine
from ingine.engine.request import EngineRequest
from ingine.engine.store.model_store import DEFAULT_MODEL
from ingine.sampling_params import SamplingParams

PROMPT = "Write the record of a person in JSON. "
COMPACT = {"x-guidance": {"whitespace_flexible": False}}
LIST = {
    "type": "array",
    "minItems": 1000,
    "items": {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "alive": {"type": "boolean"}},
        "required": ["name", "age", "alive"],
        "additionalProperties": False,
    },
}
"""Goes on until `max_tokens`."""
RECORD = {
    "type": "object",
    "properties": {
        f"the_measured_value_of_sensor_{letter}": {"type": "integer", "minimum": 0, "maximum": 99}
        for letter in "abcdefghijklmnop"
    },
    "additionalProperties": False,
}
RECORD["required"] = list(RECORD["properties"])
CASES = {"list": LIST, "list, compact": LIST | COMPACT, "record": RECORD, "record, compact": RECORD | COMPACT}


class Decoding:
    """The decode steps of one engine."""

    def __init__(self, path: str):
        self.engine = Engine(EngineConfig(path, max_model_len=1024, max_num_seqs=64, kv_cache_bytes="512MiB"))
        self._prompt = self.engine.tokenizer.encode(PROMPT)

    def begin(self, params: list[SamplingParams]) -> None:
        """Prefill all sequences. Their first tokens are not in the figures."""
        self.num_tokens = self.num_steps = 0
        self.wall_s = self.processor_s = 0.0
        self.lengths = dict.fromkeys(map(str, range(len(params))), 0)
        for index, each in enumerate(params):
            self.engine.add(EngineRequest(str(index), self._prompt, each))
        while not all(self.lengths.values()):
            self._take(self.engine.step())

    def step(self) -> bool:
        """Run one step. Returns False if all sequences have ended."""
        if not self.engine.has_unfinished:
            return False
        began, began_processor = time.perf_counter(), time.process_time()
        outputs = self.engine.step()
        self.wall_s += time.perf_counter() - began
        self.processor_s += time.process_time() - began_processor
        self.num_tokens += sum(len(output.token_ids) for output in outputs)
        self.num_steps += 1
        self._take(outputs)
        return True

    def _take(self, outputs: list) -> None:
        for output in outputs:
            self.lengths[output.seq_id] += len(output.token_ids)


def compare(constrained: Decoding, free: Decoding, schema: dict, num_seqs: int, max_tokens: int) -> tuple:
    """Rates of constrained over free decoding by wall and by processor time, and tokens of a sequence and
    step."""
    asked = {"structured_outputs": {"json": schema}, "max_tokens": max_tokens}
    params = [SamplingParams(temperature=0.8, seed=seed, **asked) for seed in range(num_seqs)]
    constrained.begin(params)
    # As long as the constrained ones, which a first run tells.
    while constrained.step():
        pass
    lengths = list(constrained.lengths.values())
    constrained.begin(params)
    free.begin(
        [
            SamplingParams(temperature=0.8, seed=seed, max_tokens=max(2, length), ignore_eos=True)
            for seed, length in enumerate(lengths)
        ]
    )
    while constrained.step() | free.step():
        pass
    wall, processor = (
        (constrained.num_tokens / ours) / (free.num_tokens / theirs)
        for ours, theirs in (
            (constrained.wall_s, free.wall_s),
            (constrained.processor_s, free.processor_s),
        )
    )
    per_step = constrained.num_tokens / constrained.num_steps / num_seqs
    return wall, processor, per_step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--num-seqs", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    constrained, free = (Decoding(options.model) for _ in range(2))
    drafts = constrained.engine._scheduler.max_forced_draft
    print("| schema | sequences | forced drafts | rate, wall | rate, processor | tokens a step |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, schema in CASES.items():
        for num_seqs in options.num_seqs:
            for max_draft in (0, drafts):
                constrained.engine._scheduler.max_forced_draft = max_draft
                rounds = [
                    compare(constrained, free, schema, num_seqs, options.max_tokens)
                    for _ in range(options.rounds)
                ]
                wall, processor, per_step = map(median, zip(*rounds, strict=True))
                print(
                    f"| {name} | {num_seqs} | {'yes' if max_draft else 'no'} "
                    f"| {wall:.2f} | {processor:.2f} | {per_step:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
