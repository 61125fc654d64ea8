"""onnxruntime-genai, whose batches on a CPU are static, with prompts of one length.

Requests of different lengths run in separate batches, one after the other. Options: `files`, a folder made by
`onnxruntime_files.py`.
"""

from collections import defaultdict
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import onnxruntime_genai

from benchmarks.rivals.protocol import Loaded, Recording, Request, serve

PACKAGES = ("onnxruntime-genai", "onnxruntime", "onnx-ir", "transformers")


class StaticBatches:
    def __init__(self, model: onnxruntime_genai.Model):
        self._model = model

    def run(self, requests: Sequence[Request]) -> Recording:
        if any(request.arrival_s for request in requests):
            raise ValueError("a static batch has no place for requests that arrive later")
        batches: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            batches[len(request.prompt), request.num_tokens].append(index)
        recording = Recording(requests)
        for (num_prompt_tokens, num_tokens), indexes in batches.items():
            params = onnxruntime_genai.GeneratorParams(self._model)
            length = num_prompt_tokens + num_tokens
            # The end of sequence cannot be ignored, but below the minimum length it is never chosen.
            params.set_search_options(
                do_sample=False, batch_size=len(indexes), min_length=length, max_length=length
            )
            generator = onnxruntime_genai.Generator(self._model, params)
            generator.append_tokens(np.array([requests[index].prompt for index in indexes], dtype=np.int32))
            for _ in range(num_tokens):
                generator.generate_next_token()
                for index, token_id in zip(indexes, generator.get_next_tokens(), strict=True):
                    recording.tokens(index, [int(token_id)])
        return recording


def load(model: str, options: dict[str, Any]) -> Loaded:
    return Loaded(
        StaticBatches(onnxruntime_genai.Model(options["files"])),
        versions={package: version(package) for package in PACKAGES},
        settings=options,
    )


if __name__ == "__main__":
    serve(load)
