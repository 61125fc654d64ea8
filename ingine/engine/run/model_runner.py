"""Runs the model on a scheduled batch, and samples where a sequence has caught up.

A step has two halves, `forward` and `sample`. Both only enqueue work: what comes of it is waited for in
`StepResult.wait`. Tokens stay on the device as well, so that the next step can be enqueued behind this one
before the host has seen them.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ingine.engine.communication.parallel import SINGLE, TensorParallel
from ingine.engine.communication.transfer import to_device
from ingine.engine.kernels.attention import KVCache
from ingine.engine.models.interface import Model
from ingine.engine.run.graphs import Choice, DecodeGraphs, carry_over
from ingine.engine.run.step_inputs import StepInputs, Work, in_order, pack
from ingine.engine.sample.sampler import Sampled, SampledToken, sample, sampling_rows
from ingine.engine.schedule.scheduler import ScheduledBatch
from ingine.engine.schedule.sequence import Sequence, SequenceAhead

Rows = list[Sequence | SequenceAhead]
"""What each row of logits is sampled as."""


@dataclass(slots=True)
class ForwardPass:
    """The first half of a step, in flight, and what the second half takes of it."""

    inputs: StepInputs
    choice: Choice | None
    """How a graph may sample, if there are graphs; None: no graph can."""
    caught_up: list[Work]
    """On rank 0; empty on others, and so are `rows`."""
    rows: Rows
    hidden: Tensor | None
    """[num_rows, hidden_size]: final hidden states of the tokens after which one is sampled; None for none.
    Good until the next `ModelRunner.forward`."""


class StepResult:
    """A step in flight."""

    def __init__(self, sampled: Sampled | None, caught_up: list[Work]):
        self._sampled, self._caught_up = sampled, caught_up

    def wait(self) -> list[tuple[Sequence, list[SampledToken]]]:
        """The next token of each sequence that has caught up; with a draft the next ones, up to the first
        that is not as drafted."""
        return _split(self._sampled.wait(), self._caught_up) if self._sampled else []


class ModelRunner:
    """With tensor parallelism each rank has one: rank 0's is told what to compute, the others `follow`."""

    def __init__(
        self,
        model: Model,
        kv_caches: list[KVCache],
        block_size: int,
        *,
        tokens: Tensor,
        graphs: DecodeGraphs | None = None,
        parallel: TensorParallel = SINGLE,
    ):
        """`kv_caches` are what `model` allocated, of blocks of `block_size` tokens.

        tokens: [most tokens of a step] int64 on the model's device, where a step leaves those that it
        samples; `graphs` have the same.
        """
        self._model, self._kv_caches, self._block_size = model, kv_caches, block_size
        self._tokens = tokens
        self._graphs = graphs
        self._parallel = parallel
        self._rows_of_last_step: dict[Sequence, int] = {}

    @torch.inference_mode()
    def forward(self, batch: ScheduledBatch) -> ForwardPass:
        """Enqueue the model on a batch. If this or its `sample` raises, the batch counts for nothing.

        Its `sample` has to follow before the next batch: other ranks go on to that by themselves.
        """
        work = in_order(batch)
        inputs = pack(work, self._block_size, self._rows_of_last_step)
        caught_up = [one for one in work if one.catches_up]
        rows: Rows = []
        for one in caught_up:
            rows += [one.seq, *one.seq.ahead(one.draft)]
        choice = _choice(rows)
        self._parallel.send((inputs, choice))
        try:
            hidden = self._forward(inputs)
        except Exception:
            self._parallel.abort()
            raise
        return ForwardPass(inputs, choice, caught_up, rows, hidden)

    @torch.inference_mode()
    def sample(self, forward_pass: ForwardPass) -> StepResult:
        """Enqueue what chooses the next tokens of the sequences that have caught up."""
        try:
            sampled = self._sample(forward_pass)
        except Exception:
            self._parallel.abort()
            raise
        self._rows_of_last_step = {one.seq: row for row, one in enumerate(forward_pass.caught_up)}
        return StepResult(sampled, forward_pass.caught_up)

    @torch.inference_mode()
    def follow(self) -> None:
        """Take part in the steps of rank 0, until it says that there are no more."""
        while (message := self._parallel.receive()) is not None:
            inputs, choice = message
            self._sample(ForwardPass(inputs, choice, [], [], self._forward(inputs)))

    # What every rank does.

    def _forward(self, inputs: StepInputs) -> Tensor | None:
        """Returns `ForwardPass.hidden`."""
        if self._is_replayed(inputs):
            return self._graphs.run_model(inputs)
        device = self._model.device
        input_ids = to_device(inputs.input_ids, device)
        if inputs.carried is not None:
            decodes = input_ids[: len(inputs.carried)]
            decodes.copy_(carry_over(decodes, to_device(inputs.carried, device), self._tokens))
        positions = to_device(inputs.positions, device)
        hidden = self._model.forward(input_ids, positions, self._kv_caches, inputs.metadata(device))
        return hidden[to_device(inputs.logits_rows, device)] if len(inputs.logits_rows) else None

    def _sample(self, forward_pass: ForwardPass) -> Sampled | None:
        """None where nothing is sampled, and on other ranks than 0."""
        if forward_pass.hidden is None:
            return None
        if forward_pass.choice is not None and self._is_replayed(forward_pass.inputs):
            return self._sample_by_graph(forward_pass)
        return self._sample_by_operations(forward_pass)

    def _is_replayed(self, inputs: StepInputs) -> bool:
        return self._graphs is not None and self._graphs.cover(inputs)

    def _sample_by_graph(self, forward_pass: ForwardPass) -> Sampled | None:
        choice, rows = forward_pass.choice, forward_pass.rows
        numbers = sampling_rows(rows) if rows and choice is Choice.RANDOM else None
        tokens = self._graphs.sample(len(forward_pass.hidden), choice, numbers)
        return Sampled(tokens) if rows else None

    def _sample_by_operations(self, forward_pass: ForwardPass) -> Sampled | None:
        logits, rows = self._model.compute_logits(forward_pass.hidden), forward_pass.rows
        tokens, sampled = self._tokens[: len(logits)], None
        if rows:
            has_penalties = any(row.token_counts is not None for row in rows)
            pending = self._pending(forward_pass.inputs) if has_penalties else None
            sampled = sample(logits, rows, self._model.kernels.sampling, pending=pending)
            tokens.copy_(sampled.token_ids)
        self._parallel.broadcast(tokens)
        return sampled

    def _pending(self, inputs: StepInputs) -> Tensor | None:
        """[num_rows]: what the last step sampled and the host has not seen, for each row; -1 for none."""
        if inputs.carried is None:
            return None
        # Of a step without drafts, which is the only one that carries over, a row is the last of a sequence.
        carried = np.full(len(inputs.query_lens), -1, dtype=np.int64)
        carried[: len(inputs.carried)] = inputs.carried
        last_tokens = np.cumsum(inputs.query_lens) - 1
        carried = to_device(carried[np.searchsorted(last_tokens, inputs.logits_rows)], self._tokens.device)
        return torch.where(carried >= 0, self._tokens[carried.clamp(min=0)], -1)


def _choice(rows: Rows) -> Choice | None:
    """None: penalties and the like, or log probabilities, which no graph has."""
    if not all(row.is_plain for row in rows):
        return None
    return Choice.GREEDY if all(row.params.greedy for row in rows) else Choice.RANDOM


def _split(tokens: list[SampledToken], caught_up: list[Work]) -> list[tuple[Sequence, list[SampledToken]]]:
    """Each sequence's own of the sampled tokens, as far as they count.

    What was sampled after one that is not as drafted follows what never was.
    """
    found, start = [], 0
    for one in caught_up:
        draft, num_right = one.draft, 0
        while num_right < len(draft) and tokens[start + num_right].token_id == draft[num_right]:
            num_right += 1
        found.append((one.seq, tokens[start : start + num_right + 1]))
        start += len(draft) + 1
    return found
