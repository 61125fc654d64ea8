"""The interface between the worker and its engine, in a thread or in a process. Does not import torch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from ingine.engine.limits import RequestLimits
from ingine.engine.outputs import EngineStats, SeqOutput
from ingine.engine.request import EngineRequest
from ingine.engine.text.tokenizer import Tokenizer


@dataclass(slots=True)
class EngineFailure:
    """An exception of the engine, which has dropped the sequences that may have caused it."""

    seq_ids: list[str]
    error: Exception
    fatal: bool = False
    """The engine is broken and computes no more steps."""


StepMessage = list[SeqOutput] | EngineFailure


class EngineHost(Protocol):
    """The host of an engine: `EngineThread` or `EngineProcess`. Its constructor builds the engine."""

    stats: EngineStats
    """The engine's statistics as of the last message."""

    @property
    def tokenizer(self) -> Tokenizer | None: ...

    @property
    def model_type(self) -> str:
        """`ModelConfig.model_type`: the model's family."""

    @property
    def max_num_seqs(self) -> int: ...

    @property
    def numerics(self) -> str:
        """`Engine.numerics`: the number formats that the engine computes in."""

    @property
    def limits(self) -> RequestLimits:
        """The limits that validate and complete requests. Usable from any thread."""

    async def start(self, deliver: Callable[[StepMessage], None]) -> None:
        """Begin to run. `deliver` is called in the running loop, in the order of the engine's steps."""

    def add(self, request: EngineRequest) -> None:
        """Add a request, as `Engine.add` does. An error is delivered as an EngineFailure of this sequence."""

    def abort(self, seq_id: str) -> None:
        """Abort a sequence. Its last output, with finish reason `abort`, is delivered like a step's. An
        unknown sequence is ignored."""

    def credit(self) -> None:
        """Allow one step more, after a message has been dealt with."""

    async def stop(self) -> None:
        """End the engine after the current step. Once this returns, nothing more is delivered."""

    def close(self) -> None:
        """Release the engine, even while a step hangs. May block for seconds. Call it last."""

    @property
    def alive(self) -> bool:
        """Whether the engine computes, or would if it had sequences."""

    @property
    def step_age_s(self) -> float:
        """Seconds that the current step has taken, at least; 0.0 between steps."""

    @property
    def suspects(self) -> list[str]:
        """The ids of the sequences that may be in a step that does not return."""
