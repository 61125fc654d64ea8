"""The model that a worker serves: its names, and the fingerprint of all that determines a job's events."""

from dataclasses import dataclass
from pathlib import Path

from ingine.contract.keys import parked


@dataclass(frozen=True)
class ServedModel:
    names: frozenset[str]
    """The values of `Job.model` that select it."""
    weights: str
    """The `ingine.engine.store.fingerprint.model_fingerprint` of its folder."""
    numerics: str
    """`EngineHost.numerics`, the number formats that it computes in, and the parsers of messages that the
    worker's settings name.
    """

    @property
    def name(self) -> str:
        """The name to display."""
        return Path(max(self.names, key=len)).name

    @property
    def fingerprint(self) -> str:
        return f"{self.weights}:{self.numerics}"

    @property
    def aliases(self) -> list[str]:
        """The names and the fingerprint for which another worker may park an entry that is to run here."""
        return [self.fingerprint, *sorted(self.names)]

    @property
    def parked(self) -> list[str]:
        """The consumers that entries for this model are parked with."""
        return [parked(alias) for alias in self.aliases]

    def same_weights(self, fingerprint: str) -> bool:
        """Whether a model of this fingerprint has the same weights and vocabulary, though it may compute in
        other number formats."""
        return fingerprint.partition(":")[0] == self.weights
