"""ingine: an inference engine with continuous batching, and a worker that is fed through Redis."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ingine.engine.llm import LLM, RequestOutput
    from ingine.sampling_params import SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "RequestOutput", "SamplingParams", "__version__"]

_EXPORTS = {
    "LLM": "ingine.engine.llm",
    "RequestOutput": "ingine.engine.llm",
    "SamplingParams": "ingine.sampling_params",
}


def __getattr__(name: str):
    # Lazy, so that `import ingine.contract.jobs` (all that a producer needs) never imports torch.
    if name not in _EXPORTS:
        raise AttributeError(f"module 'ingine' has no attribute {name!r}")
    try:
        return getattr(import_module(_EXPORTS[name]), name)
    except ModuleNotFoundError as error:
        from ingine.extras import missing_extra

        if (said := missing_extra(error, f"ingine.{name}")) is None:
            raise
        raise ModuleNotFoundError(said, name=error.name) from None
