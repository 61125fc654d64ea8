"""ingine: an inference engine with continuous batching, and a worker that is fed through Redis."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ingine.llm import LLM, RequestOutput
    from ingine.sampling_params import SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "RequestOutput", "SamplingParams", "__version__"]

_EXPORTS = {"LLM": "ingine.llm", "RequestOutput": "ingine.llm", "SamplingParams": "ingine.sampling_params"}


def __getattr__(name: str):
    # Lazy, so that `import ingine.wire` (all that a producer needs) never imports torch.
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'ingine' has no attribute {name!r}")
