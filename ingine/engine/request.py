"""What an engine is asked to generate. Imports no torch, like `limits.py`, which validates it."""

from collections.abc import Sequence as Tokens
from dataclasses import dataclass

from ingine.engine.message_format import MessageFormat
from ingine.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One sequence to generate, or `params.n` sequences that are choices of one request."""

    seq_id: str
    """The name of the request in outputs and errors. Unique until all of its sequences have ended."""
    prompt_token_ids: Tokens[int]
    params: SamplingParams
    """Complete: the engine does not fill in the model's own defaults, see `RequestLimits.with_defaults`."""
    priority: int = 0
    """Lower is more urgent."""
    output_token_ids: Tokens[int] = ()
    """The output of an earlier attempt. The sequence continues after these tokens exactly as if it had never
    been interrupted; their text is not returned again."""
    arrival_time: float | None = None
    """Seconds since the epoch. None is the time at which the request is added."""
    bad_words_token_ids: Tokens[Tokens[int]] = ()
    """The result of `encode_bad_words` for `params.bad_words`. Without it the engine tokenises them."""
    tenant: str = ""
    """The owner of the request. By default suffix speculation drafts only from the same tenant's outputs."""
    other_output_token_ids: Tokens[Tokens[int]] = ()
    """With n > 1: the earlier output of choice 1 and those after it; `output_token_ids` is that of choice 0.
    Missing ones are empty."""
    ended_choices: Tokens[int] = ()
    """With n > 1: the indices of the choices that an earlier attempt has ended. Nothing follows their output,
    even if this engine would continue it."""

    message: MessageFormat | None = None
    """How the output is read as an assistant message. None: the output is text alone.

    The grammar of `params.structured_outputs` begins after the reasoning that it names, see
    `ingine.engine.grammar.reasoning`.
    """

    def output_of(self, index: int) -> Tokens[int]:
        """The earlier output of a choice."""
        if index == 0:
            return self.output_token_ids
        others = self.other_output_token_ids
        return others[index - 1] if index <= len(others) else ()
