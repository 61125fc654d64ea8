"""The choices of one request: sequences with one prompt, which the first of them computes for all."""

from array import array
from itertools import count
from typing import Protocol

_numbers = count()


class Choice(Protocol):
    """What a group needs to know of a sequence."""

    block_table: array
    num_hashed_blocks: int


class ChoiceGroup:
    """Holds back a request's choices while one of them computes the full blocks of the prompt.

    The choice that is admitted without these blocks computes them. The others are admitted once they are
    cached, and share them. If that choice ends or is preempted first, the next one to be admitted takes its
    place, so no choice waits for one that does not run.
    """

    def __init__(self, num_prompt_tokens: int, block_size: int):
        self._num_shared_blocks = (num_prompt_tokens - 1) // block_size
        self._computing: Choice | None = None
        self.salt = next(_numbers).to_bytes(16)
        """Begins the hashes of the choices' blocks if only they may share them."""

    @property
    def awaits_prompt(self) -> bool:
        """Whether the prompt is being computed: no further choice is to be admitted."""
        seq = self._computing
        return seq is not None and bool(seq.block_table) and not self._has_prompt(seq)

    def admit(self, seq: Choice) -> None:
        """Note that `seq` has been admitted, with the cached blocks that it begins with."""
        if not self._has_prompt(seq):
            self._computing = seq

    def _has_prompt(self, seq: Choice) -> bool:
        return seq.num_hashed_blocks >= self._num_shared_blocks
