"""Measures the gain of each kind of speculation, and its cost where it gains nothing: decode rates without,
by prompt lookup and by suffix, a step of each in turns: `python benchmarks/speculation.py`.

Each text (`speculation_texts.py`) is a list of requests that come as many at a time as there are streams. The
engines are new for each text, so that a request's answer is in no history before it was given. Prefill is not
in the figures. Where neighbours disturb, the ratio of processor time says more than that of wall time: run it
with OMP_NUM_THREADS=1, or with OMP_WAIT_POLICY=PASSIVE, else threads that wait count as well.
"""

import argparse
import time

from benchmarks.speculation_texts import TEXTS, Request
from ingine.engine.config import SPECULATIONS, EngineConfig
from ingine.engine.engine import Engine
from ingine.engine.request import EngineRequest
from ingine.engine.store.model_store import DEFAULT_MODEL
from ingine.sampling_params import SamplingParams

METHODS = (None, *SPECULATIONS)
NUM_STREAMS = (1, 8)


class Decoding:
    """The decoding of one engine, from the step after the last prefill of each batch of requests."""

    def __init__(self, engine: Engine, max_tokens: int):
        self.engine = engine
        self.outputs: list[list[int]] = []
        self.num_tokens = self.num_steps = 0
        """Decoded tokens; and steps, counted once for each sequence in a step."""
        self.wall_s = self.processor_s = 0.0
        self._max_tokens = max_tokens

    def begin(self, requests: list[Request]) -> None:
        first = len(self.outputs)
        for index, (messages, sampling) in enumerate(requests, start=first):
            params = SamplingParams(max_tokens=self._max_tokens, **sampling)
            self.engine.add(EngineRequest(str(index), self.engine.tokenizer.encode_chat(messages), params))
            self.outputs.append([])
        while not all(self.outputs[first:]):
            self._take(self.engine.step())

    def step(self) -> bool:
        """Run one step. Returns False if all streams have ended."""
        if not self.engine.has_unfinished:
            return False
        began, began_processor = time.perf_counter(), time.process_time()
        outputs = self.engine.step()
        self.wall_s += time.perf_counter() - began
        self.processor_s += time.process_time() - began_processor
        self.num_tokens += sum(len(output.token_ids) for output in outputs)
        self.num_steps += len(outputs)
        self._take(outputs)
        return True

    def _take(self, outputs: list) -> None:
        for output in outputs:
            self.outputs[int(output.seq_id)] += output.token_ids


def decode(
    engines: list[Engine], requests: list[Request], num_streams: int, max_tokens: int
) -> list[Decoding]:
    runs = [Decoding(engine, max_tokens) for engine in engines]
    for first in range(0, len(requests), num_streams):
        for run in runs:
            run.begin(requests[first : first + num_streams])
        in_turn = list(runs)
        while any([run.step() for run in in_turn]):
            in_turn.append(in_turn.pop(0))  # a different one is first each time
    assert all(run.outputs == runs[0].outputs for run in runs), "speculation has changed a token"
    return runs


def report(plain: Decoding, run: Decoding) -> str:
    stats = run.engine.stats()
    return (
        f"{run.engine.config.speculation or 'none'} | {run.num_tokens / run.wall_s:.1f} "
        f"| {plain.wall_s / run.wall_s:.2f} | {plain.processor_s / run.processor_s:.2f} "
        f"| {run.num_tokens / run.num_steps:.2f} | {stats.num_accepted_tokens} of {stats.num_draft_tokens}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=16, help="of each text, at most")
    parser.add_argument("--tokens", type=int, default=96, help="of each request, at most")
    parser.add_argument("--streams", type=int, nargs="+", default=NUM_STREAMS)
    parser.add_argument("--speculative-tokens", type=int, default=8)
    args = parser.parse_args()
    options = {
        "max_model_len": 512,
        "max_num_seqs": max(args.streams),
        "kv_cache_bytes": 1 << 28,
        "num_speculative_tokens": args.speculative_tokens,
    }
    first = Engine(EngineConfig(DEFAULT_MODEL, **options))

    print("streams, text | speculation | tok/s | ratio | of processor time | tokens a step | accepted")
    for name, text in TEXTS.items():
        for num_streams in args.streams:
            engines = [
                Engine(
                    EngineConfig(DEFAULT_MODEL, speculation=method, **options),
                    model=first._runner._model,
                    tokenizer=first.tokenizer,
                )
                for method in METHODS
            ]
            runs = decode(engines, list(text())[: args.requests], num_streams, args.tokens)
            for run in runs:
                print(f"{num_streams}, {name} | {report(runs[0], run)}", flush=True)


if __name__ == "__main__":
    main()
