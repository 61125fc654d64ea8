"""The uninterrupted run: makes the model, and its answer to each greedy request without faults."""

import json
from pathlib import Path

from ingine.engine.request import EngineRequest
from ingine.sampling_params import SamplingParams
from tests.chaos.jobs import greedy_requests

MIN_MARGIN = 1e-4
"""Minimum lead of the best token's logprob. Batches differ by some 1e-6, so they cannot change the choice."""


def run(*, model: str, answers: str) -> None:
    """Make the model, and write [token ids, text] of each request."""
    import torch  # not at the top: the harness, which only reads the answers, needs none

    from tests.tiny_models import make_tiny_model

    torch.set_num_threads(1)
    make_tiny_model(Path(model))
    Path(answers).write_text(json.dumps(uninterrupted(model)))


def uninterrupted(model: str) -> list[tuple[list[int], str]]:
    """Generate the answers. Raises ValueError if a choice is so close that two batches could differ."""
    from ingine.engine.config import EngineConfig
    from ingine.engine.engine import Engine

    engine = Engine(EngineConfig(model=model, dtype="float32", device="cpu", kv_cache_bytes=16 << 20))
    for index, (prompt, sampling) in enumerate(greedy_requests()):
        params = SamplingParams(**sampling | {"logprobs": 2})
        engine.add(EngineRequest(str(index), engine.tokenizer.encode(prompt), params))
    answers: list[tuple[list[int], str]] = [([], "") for _ in greedy_requests()]
    while engine.has_unfinished:
        for out in engine.step():
            for entry in out.logprobs or ():
                (_, best), (_, second), *_ = entry["top"]
                if best - second < MIN_MARGIN:
                    raise ValueError(f"request {out.seq_id} has a tie at {out.position}: change its prompt")
            token_ids, text = answers[int(out.seq_id)]
            answers[int(out.seq_id)] = (token_ids + out.token_ids, text + out.text + out.final_text)
    return answers


def read_answers(path: Path) -> list[tuple[list[int], str]]:
    return [(token_ids, text) for token_ids, text in json.loads(path.read_text())]
