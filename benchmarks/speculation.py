"""What speculation by prompt lookup brings, and what it costs where it brings nothing: decode rates with and
without, a step of one and a step of the other in turns: `python benchmarks/speculation.py`.

Two texts: a passage that the prompt asks to repeat, greedily, so that the output copies the prompt; and free
text at temperature 1, which hardly repeats anything. Prefill is not in the figures. Where neighbours disturb,
the ratio of processor time says more than that of wall time; it takes OMP_WAIT_POLICY=PASSIVE, else threads
that wait count as well.
"""

import argparse
import time
from statistics import median

from ingine.config import EngineConfig
from ingine.engine import Engine
from ingine.model_store import DEFAULT_MODEL
from ingine.outputs import EngineStats
from ingine.sampling_params import SamplingParams

PASSAGE = (
    "The harbour of the old town lies open to the west. In autumn the fishing boats stay at their moorings "
    "for weeks, and the men mend nets in the long sheds behind the quay. Gulls sit on the roofs in rows. "
    "When the wind turns at last, usually in the night, the engines are heard before daybreak, one after the "
    "other, and by the time the baker opens his shop the harbour is empty but for two grey dinghies."
)
NUM_STREAMS = (1, 8, 32)
TEXTS = {
    "a copy, greedy": (f"Repeat this text word for word:\n{PASSAGE}", {"temperature": 0}),
    "free text, temperature 1": ("Tell me a story about a lighthouse.", {"temperature": 1.0}),
}


class Decoding:
    """Streams of one engine, from the step after the last prefill on."""

    def __init__(self, engine: Engine, prompt: list[int], num_streams: int, max_tokens: int, sampling: dict):
        self.engine = engine
        self.num_tokens, self.wall_s, self.processor_s = 0, 0.0, 0.0
        waiting = {str(index) for index in range(num_streams)}
        for index in range(num_streams):
            params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, seed=index, **sampling)
            engine.add(str(index), prompt, params)
        while waiting:
            waiting -= {output.seq_id for output in engine.step()}

    def step(self) -> bool:
        """False if all streams have ended."""
        if not self.engine.has_unfinished:
            return False
        began, began_processor = time.perf_counter(), time.process_time()
        outputs = self.engine.step()
        self.wall_s += time.perf_counter() - began
        self.processor_s += time.process_time() - began_processor
        self.num_tokens += sum(len(output.token_ids) for output in outputs)
        return True


def make_engines() -> tuple[Engine, Engine]:
    """Without speculation and with it, on one model."""
    options = {
        "max_model_len": 512,
        "max_num_seqs": max(NUM_STREAMS),
        "kv_cache_bytes": 1 << 30,
        "enable_prefix_caching": False,
    }
    plain = Engine(EngineConfig(DEFAULT_MODEL, **options))
    config = EngineConfig(DEFAULT_MODEL, speculation="ngram", **options)
    return plain, Engine(config, model=plain._runner._model, tokenizer=plain.tokenizer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=96, help="of each stream")
    args = parser.parse_args()
    engines = make_engines()
    speculating = engines[1]

    print(
        "streams, text | tok/s without | with | ratio (least, most of a round) | of processor time | accepted"
    )
    for name, (chat, sampling) in TEXTS.items():
        prompt = speculating.tokenizer.encode_chat([{"role": "user", "content": chat}])
        for num_streams in NUM_STREAMS:
            before, rounds = speculating.stats(), []
            for _ in range(args.rounds):
                both = [Decoding(engine, prompt, num_streams, args.tokens, sampling) for engine in engines]
                while any([decoding.step() for decoding in both]):
                    both.reverse()  # neither is always the first of a pair
                rounds.append(sorted(both, key=lambda decoding: decoding.engine is speculating))
            print(
                f"{num_streams}, {name} | {report(rounds)} | {accepted(before, speculating.stats())}",
                flush=True,
            )


def report(rounds: list[list[Decoding]]) -> str:
    """Of rounds without and with speculation, which yield as many tokens."""
    without, with_ = (
        median(run.num_tokens / run.wall_s for run in runs) for runs in zip(*rounds, strict=True)
    )
    ratios = sorted(plain.wall_s / speculating.wall_s for plain, speculating in rounds)
    processor = median(plain.processor_s / speculating.processor_s for plain, speculating in rounds)
    ratio = f"{median(ratios):.2f} ({ratios[0]:.2f}, {ratios[-1]:.2f})"
    return f"{without:.1f} | {with_:.1f} | {ratio} | {processor:.2f}"


def accepted(before: EngineStats, after: EngineStats) -> str:
    num_accepted = after.num_accepted_tokens - before.num_accepted_tokens
    return f"{num_accepted} of {after.num_draft_tokens - before.num_draft_tokens}"


if __name__ == "__main__":
    main()
