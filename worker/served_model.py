"""Which model a worker serves: its names, and the fingerprint of what decides its tokens."""

from dataclasses import dataclass
from pathlib import Path

from ingine.contract.keys import parked


@dataclass(frozen=True)
class ServedModel:
    names: frozenset[str]
    """The values of `Job.model` that mean it."""
    weights: str
    """`ingine.engine.store.fingerprint.model_fingerprint` of its folder."""
    numerics: str
    """`EngineHost.numerics`: the numbers that it computes in."""

    @property
    def name(self) -> str:
        """The one to show."""
        return Path(max(self.names, key=len)).name

    @property
    def fingerprint(self) -> str:
        return f"{self.weights}:{self.numerics}"

    @property
    def aliases(self) -> list[str]:
        """All that another worker may park an entry for, to have it run here."""
        return [self.fingerprint, *sorted(self.names)]

    @property
    def parked(self) -> list[str]:
        """The consumers of such entries."""
        return [parked(alias) for alias in self.aliases]

    def same_weights(self, fingerprint: str) -> bool:
        """Whether token ids mean the same there, though it may compute in other numbers."""
        return fingerprint.partition(":")[0] == self.weights
