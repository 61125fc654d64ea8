"""The engine of this checkout, in process.

Options are fields of `EngineConfig`, and `files`, a GGUF file whose weights are used as stored.
"""

import subprocess
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.rivals.child import ROOT
from benchmarks.rivals.protocol import Loaded, Request, serve
from benchmarks.rivals.stepping import Stepping
from ingine import __version__
from ingine.engine.config import EngineConfig
from ingine.engine.engine import Engine
from ingine.engine.request import EngineRequest
from ingine.sampling_params import SamplingParams


class IngineSteps:
    def __init__(self, engine: Engine):
        self._engine = engine

    def add(self, index: int, request: Request) -> None:
        params = SamplingParams(temperature=0, max_tokens=request.num_tokens, ignore_eos=True)
        self._engine.add(EngineRequest(str(index), request.prompt, params))

    def step(self) -> Iterator[tuple[int, list[int]]]:
        for output in self._engine.step():
            yield int(output.seq_id), output.token_ids


def load(model: str, options: dict[str, Any]) -> Loaded:
    options = dict(options)
    if file := options.pop("files", None):
        model = file
    engine = Engine(EngineConfig(model=model, **options))
    kernels = engine._runner._model.kernels
    return Loaded(
        Stepping(IngineSteps(engine)),
        versions={"ingine": __version__, "torch": torch.__version__} | git_commit(),
        settings={
            **asdict(engine.config),
            "torch_threads": torch.get_num_threads(),
            "attention": kernels.attention.name,
            "layer_operations": kernels.ops.name,
            "weights": kernels.weights.name,
            **({"gguf": Path(file).name, "gguf_bytes": Path(file).stat().st_size} if file else {}),
        },
    )


def git_commit() -> dict[str, str]:
    """The commit of the checkout, with `-dirty` if files differ from it; {} without git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"commit": said.stdout.strip()}


if __name__ == "__main__":
    serve(load)
