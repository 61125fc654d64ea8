"""OpenVINO GenAI's continuous batching, stepped in this process.

Options: `files`, a folder made by `openvino_files.py`; `scheduler`, fields of `SchedulerConfig`; `properties`
of the CPU plugin. It generates no text, since none is requested.
"""

from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import numpy as np
import openvino
from openvino_genai import ContinuousBatchingPipeline, GenerationConfig, SchedulerConfig

from benchmarks.rivals.protocol import Loaded, Request, serve
from benchmarks.rivals.stepping import Stepping

PACKAGES = ("openvino-genai", "openvino", "optimum-intel", "nncf", "transformers")


class OpenVinoSteps:
    def __init__(self, pipeline: ContinuousBatchingPipeline):
        self._pipeline = pipeline
        self._handles: dict[int, Any] = {}
        self._next_id = 0

    def add(self, index: int, request: Request) -> None:
        config = GenerationConfig(
            max_new_tokens=request.num_tokens, ignore_eos=True, do_sample=False, apply_chat_template=False
        )
        input_ids = openvino.Tensor(np.array([request.prompt], dtype=np.int64))
        self._handles[index] = self._pipeline.add_request(self._next_id, input_ids, config)
        self._next_id += 1

    def step(self) -> Iterator[tuple[int, list[int]]]:
        self._pipeline.step()
        for index, handle in list(self._handles.items()):
            while handle.can_read():
                for output in handle.read().values():
                    yield index, output.generated_ids
            if handle.get_status().name != "RUNNING":
                del self._handles[index]


def load(model: str, options: dict[str, Any]) -> Loaded:
    scheduler = SchedulerConfig()
    for name, value in options["scheduler"].items():
        setattr(scheduler, name, value)
    pipeline = ContinuousBatchingPipeline(options["files"], scheduler, "CPU", options["properties"])
    return Loaded(
        Stepping(OpenVinoSteps(pipeline)),
        versions={package: version(package) for package in PACKAGES},
        settings=options,
    )


if __name__ == "__main__":
    serve(load)
