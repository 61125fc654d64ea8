"""What is asked of an engine. Imports no torch, like `limits.py`, which says what is refused."""

from collections.abc import Sequence as Tokens
from dataclasses import dataclass

from ingine.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One sequence to generate."""

    seq_id: str
    """Names it until it has ended; outputs and failures bear it."""
    prompt_token_ids: Tokens[int]
    params: SamplingParams
    """Complete: what is not given here is not looked up in the model's own defaults."""
    priority: int = 0
    """A lower one is more urgent."""
    output_token_ids: Tokens[int] = ()
    """Tokens that the sequence has from an earlier life. It goes on after them exactly as if it had never
    stopped; their text is not emitted again."""
    arrival_time: float | None = None
    """Seconds since the epoch; None: when it is added."""
    tenant: str = ""
    """Whose it is: with speculation by suffix the outputs of one tenant speed up no other's."""
