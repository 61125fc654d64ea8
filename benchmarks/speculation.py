"""What speculation by prompt lookup brings, and what it costs where it brings nothing: decode rates with and
without, in turns: `python benchmarks/speculation.py`.

Two texts: a passage that the prompt asks to repeat, greedily, so that the output copies the prompt; and free
text at temperature 1, which hardly repeats anything. Prefill is not in the figures.
"""

import argparse
import time
from statistics import median

from ingine.config import EngineConfig
from ingine.engine import Engine
from ingine.model_store import DEFAULT_MODEL
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


def decode_rate(engine: Engine, prompt: list[int], num_streams: int, max_tokens: int, **sampling) -> float:
    """Tokens a second, from the step after the last prefill on."""
    waiting = {str(index) for index in range(num_streams)}
    for index in range(num_streams):
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, seed=index, **sampling)
        engine.add(str(index), prompt, params)
    while waiting:
        waiting -= {output.seq_id for output in engine.step()}
    num_tokens, began = 0, time.perf_counter()
    while engine.has_unfinished:
        num_tokens += sum(len(output.token_ids) for output in engine.step())
    return num_tokens / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=96, help="of each stream")
    args = parser.parse_args()
    options = {"max_model_len": 512, "max_num_seqs": max(NUM_STREAMS), "enable_prefix_caching": False}
    plain = Engine(EngineConfig(DEFAULT_MODEL, kv_cache_bytes=1 << 30, **options))
    config = EngineConfig(DEFAULT_MODEL, kv_cache_bytes=1 << 30, speculation="ngram", **options)
    speculating = Engine(config, model=plain._runner._model, tokenizer=plain.tokenizer)

    print("streams, text | tok/s without | with | ratio of medians | least, most of a round | accepted")
    for name, (chat, sampling) in TEXTS.items():
        prompt = plain.tokenizer.encode_chat([{"role": "user", "content": chat}])
        for num_streams in NUM_STREAMS:
            before = speculating.stats()
            rates = [
                [
                    decode_rate(engine, prompt, num_streams, args.tokens, **sampling)
                    for engine in (plain, speculating)
                ]
                for _ in range(args.rounds)
            ]
            after = speculating.stats()
            without, with_ = (median(rate) for rate in zip(*rates, strict=True))
            ratios = sorted(with_ / without for without, with_ in rates)
            num_drafted = after.num_draft_tokens - before.num_draft_tokens
            num_accepted = after.num_accepted_tokens - before.num_accepted_tokens
            print(
                f"{num_streams}, {name} | {without:.1f} | {with_:.1f} | {with_ / without:.2f} | "
                f"{ratios[0]:.2f}, {ratios[-1]:.2f} | {num_accepted} of {num_drafted}"
            )


if __name__ == "__main__":
    main()
