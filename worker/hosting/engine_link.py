"""What the worker and its engine say to each other, wherever the engine lives. Loads no torch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from ingine.engine.limits import RequestLimits
from ingine.engine.outputs import EngineStats, SeqOutput
from ingine.engine.request import EngineRequest
from ingine.engine.text.tokenizer import Tokenizer


@dataclass(slots=True)
class EngineFailure:
    """An exception out of the engine, which has let go of the sequences that are to blame for it."""

    seq_ids: list[str]
    error: Exception
    fatal: bool = False
    """The engine is broken, and computes no more."""


StepMessage = list[SeqOutput] | EngineFailure


class EngineHost(Protocol):
    """Where an engine lives: `EngineThread` or `EngineProcess`. Made with the engine built, or not at all."""

    stats: EngineStats
    """As of the last message."""

    @property
    def tokenizer(self) -> Tokenizer | None: ...

    @property
    def max_num_seqs(self) -> int: ...

    @property
    def numerics(self) -> str:
        """As `Engine.numerics`."""

    @property
    def limits(self) -> RequestLimits:
        """Checks and completes requests, from any thread."""

    async def start(self, deliver: Callable[[StepMessage], None]) -> None:
        """Begin to run. `deliver` is called in the running loop, in the order in which was computed."""

    def add(self, request: EngineRequest) -> None:
        """As `Engine.add`. If that raises, an EngineFailure for this sequence alone is delivered."""

    def abort(self, seq_id: str) -> None:
        """Its last output, with finish reason `abort`, is delivered like a step's. Unknown: ignored."""

    def credit(self) -> None:
        """A message has been dealt with: the engine may compute one step more."""

    async def stop(self) -> None:
        """Ends it after the step under way. What it has delivered is to be committed after this."""

    def close(self) -> None:
        """Lets go of it, whatever it is doing. May block for seconds; the last thing to be called."""

    @property
    def alive(self) -> bool:
        """Whether it computes, or would if there were something to compute."""

    @property
    def step_age_s(self) -> float:
        """For how long, at least, the step under way has been; 0.0 between steps."""

    @property
    def suspects(self) -> list[str]:
        """Sequences that a step which does not return may be about."""
