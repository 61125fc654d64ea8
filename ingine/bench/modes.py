"""The modes without a server. Each takes prompts as token ids and returns a Measurement."""

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.generation import BaseStreamer

from ingine.bench.measure import Measurement, Stopwatch
from ingine.bench.workload import NUM_OUTPUT_TOKENS, SAMPLING
from ingine.engine.engine import Engine
from ingine.engine.request import EngineRequest

Prompts = list[list[int]]


def continuous(engine: Engine, prompts: Prompts) -> Measurement:
    """Run all requests at once, in a batch that changes from step to step."""
    watch = Stopwatch(len(prompts))
    for index, prompt in enumerate(prompts):
        engine.add(EngineRequest(str(index), prompt, SAMPLING))
    _step_until_done(engine, watch)
    return watch.read(expected=NUM_OUTPUT_TOKENS)


def one_at_a_time(engine: Engine, prompts: Prompts) -> Measurement:
    """Run the same engine, but add each request only when the one before it has ended."""
    watch = Stopwatch(len(prompts))
    for index, prompt in enumerate(prompts):
        engine.add(EngineRequest(str(index), prompt, SAMPLING))
        _step_until_done(engine, watch)
    return watch.read(expected=NUM_OUTPUT_TOKENS)


def _step_until_done(engine: Engine, watch: Stopwatch) -> None:
    while engine.has_unfinished:
        for output in engine.step():
            watch.tokens(int(output.seq_id), len(output.token_ids))


def load_hugging_face(
    path: Path, *, device: torch.device, dtype: torch.dtype
) -> Callable[[Prompts], Measurement]:
    """Load the model, and return the mode of transformers' `generate`: defaults, one request at a time."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, trust_remote_code=False).to(device).eval()

    def hugging_face(prompts: Prompts) -> Measurement:
        watch = Stopwatch(len(prompts))
        for index, prompt in enumerate(prompts):
            input_ids = torch.tensor([prompt], device=device)
            model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                do_sample=False,
                min_new_tokens=NUM_OUTPUT_TOKENS,
                max_new_tokens=NUM_OUTPUT_TOKENS,
                pad_token_id=0,
                streamer=_TokenTimes(watch, index),
            )
        return watch.read(expected=NUM_OUTPUT_TOKENS)

    return hugging_face


class _TokenTimes(BaseStreamer):
    def __init__(self, watch: Stopwatch, request: int):
        self._watch, self._request = watch, request
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen:  # the first call brings the prompt
            self._watch.tokens(self._request, value.numel())
        self._prompt_seen = True

    def end(self) -> None:
        pass
