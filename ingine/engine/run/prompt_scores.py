"""Log probabilities of prompt tokens, each after the tokens before it: `prompt_logprobs`."""

import numpy as np
from torch import Tensor

from ingine.engine.communication.transfer import HostCopy, to_device
from ingine.engine.kernels.sampling.interface import Sampling
from ingine.engine.models.interface import Model
from ingine.engine.sample.sampler import report
from ingine.engine.schedule.sequence import Sequence

NUM_ROWS = 32
"""Rows of logits that are computed at a time: a prompt has thousands, each as long as the vocabulary."""

Scored = list[tuple[Sequence, range]]
"""Sequences, and the positions of the tokens of each that a step scores."""


class PromptScores:
    """The scores of a step, in flight to the host."""

    def __init__(self, scored: Scored, values: list[tuple[Tensor, ...]]):
        """values: results of `Sampling.logprobs`, which together have a row for each scored token."""
        self._scored = scored
        self._copy = HostCopy(*(tensor for of_rows in values for tensor in of_rows))

    def wait(self) -> list[tuple[Sequence, int, list[dict]]]:
        """Return for each sequence the position of the first scored token, and a report for each."""
        tensors = [tensor.tolist() for tensor in self._copy.wait()]
        rows = iter([row for i in range(0, len(tensors), 4) for row in zip(*tensors[i : i + 4], strict=True)])
        return [
            (
                seq,
                positions.start,
                [
                    report(seq.token_ids[position], seq.params.prompt_logprobs, *next(rows))
                    for position in positions
                ],
            )
            for seq, positions in self._scored
        ]


def score_prompts(model: Model, sampling: Sampling, hidden: Tensor, scored: Scored) -> PromptScores | None:
    """Enqueue the scores of prompt tokens.

    hidden: [num_tokens, hidden_size]: the final hidden state before each token of `scored`, in that order.
    Every rank calls this; `scored` is empty, and the result None, on ranks other than 0.
    """
    values = []
    token_ids = np.array([seq.token_ids[i] for seq, positions in scored for i in positions], dtype=np.int64)
    num_top = max((seq.params.prompt_logprobs for seq, _ in scored), default=0)
    for start in range(0, len(hidden), NUM_ROWS):
        logits = model.compute_logits(hidden[start : start + NUM_ROWS])
        if scored:
            of_rows = to_device(token_ids[start : start + NUM_ROWS], logits.device)
            values.append(sampling.logprobs(logits, of_rows, num_top))
    return PromptScores(scored, values) if scored else None
