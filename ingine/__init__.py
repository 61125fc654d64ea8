"""ingine: an inference engine with continuous batching, and a worker that takes its jobs from Redis.

from ingine import Client            # submit jobs, follow their tokens: needs no torch
from ingine import LLM, SamplingParams  # the engine alone
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING

if not os.path.isdir(os.path.join(__path__[0], "worker")):
    # A checkout: gateway/, producer/ and worker/ lie beside this folder and belong to it, wherever it was
    # found. In an environment that is installed for another checkout, they would otherwise be imported from
    # there.
    __path__.append(os.path.dirname(__path__[0]))

if TYPE_CHECKING:
    from ingine.engine.llm import LLM, RequestOutput
    from ingine.producer.client import AsyncClient
    from ingine.producer.sync import Client
    from ingine.sampling_params import SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "AsyncClient", "Client", "RequestOutput", "SamplingParams", "__version__"]

_HOMES = {
    "AsyncClient": "ingine.producer.client",
    "Client": "ingine.producer.sync",
    "LLM": "ingine.engine.llm",
    "RequestOutput": "ingine.engine.llm",
    "SamplingParams": "ingine.sampling_params",
}


if not TYPE_CHECKING:  # a type checker takes a module with this function to have every name

    def __getattr__(name: str):
        # Imported lazily, so that a client does not load torch, nor `ingine --help` a client.
        if name not in _HOMES:
            raise AttributeError(f"module 'ingine' has no attribute {name!r}")
        try:
            found = globals()[name] = getattr(import_module(_HOMES[name]), name)
        except ModuleNotFoundError as error:
            from ingine.extras import missing_extra

            if (said := missing_extra(error, f"ingine.{name}")) is None:
                raise
            raise ModuleNotFoundError(said, name=error.name) from None
        return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
