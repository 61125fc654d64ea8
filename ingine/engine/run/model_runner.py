"""Runs the model on a scheduled batch, and samples where a sequence has caught up.

A step is only put in line: `run` returns what is to be waited for. Its tokens stay on the device as well,
so that the next step can go in line behind it before the host has seen them.
"""

import numpy as np
import torch
from torch import Tensor

from ingine.engine.kernels.attention import KVCache
from ingine.engine.models.decoder import Decoder
from ingine.engine.run.graphs import Choice, DecodeGraphs, carry_over
from ingine.engine.run.parallel import SINGLE, TensorParallel
from ingine.engine.run.step_inputs import StepInputs, Work, in_order, pack
from ingine.engine.run.transfer import to_device
from ingine.engine.sample.sampler import Sampled, SampledToken, sample, sampling_rows
from ingine.engine.schedule.scheduler import ScheduledBatch
from ingine.engine.schedule.sequence import Sequence, SequenceAhead

Rows = list[Sequence | SequenceAhead]
"""What each row of logits is sampled as."""


class StepResult:
    """A step on its way."""

    def __init__(self, sampled: Sampled | None, caught_up: list[Work]):
        self._sampled, self._caught_up = sampled, caught_up

    def wait(self) -> list[tuple[Sequence, list[SampledToken]]]:
        """The next token of each sequence that has caught up; with a draft the next ones, up to the first
        that is not as drafted."""
        return _split(self._sampled.wait(), self._caught_up) if self._sampled else []


class ModelRunner:
    """With tensor parallelism each rank has one: rank 0's is told what to `run`, and the others `follow`."""

    def __init__(
        self,
        model: Decoder,
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
    def run(self, batch: ScheduledBatch) -> StepResult:
        """Put the batch in line. If this raises, the batch counts for nothing."""
        work = in_order(batch)
        inputs = pack(work, self._block_size, self._rows_of_last_step)
        caught_up = [item for item in work if item[1] == item[0].num_uncomputed_tokens]
        rows: Rows = []
        for seq, _, draft in caught_up:
            rows += [seq, *seq.ahead(draft)]
        choice = _choice(rows)
        self._parallel.send((inputs, choice))
        try:
            sampled = self._execute(inputs, choice, rows)
        except Exception:
            self._parallel.abort()
            raise
        self._rows_of_last_step = {seq: row for row, (seq, _, _) in enumerate(caught_up)}
        return StepResult(sampled, caught_up)

    @torch.inference_mode()
    def follow(self) -> None:
        """Take part in the steps of rank 0, until it says that there are no more."""
        while (step := self._parallel.receive()) is not None:
            self._execute(*step, [])

    def _execute(self, inputs: StepInputs, choice: Choice | None, rows: Rows) -> Sampled | None:
        """On every rank; `rows` are there on rank 0, which alone samples. None where nothing is sampled."""
        if self._graphs is not None and self._graphs.cover(inputs):
            hidden = self._graphs.run_model(inputs)
            if choice is not None:
                return self._sample_by_graph(choice, len(hidden), rows)
        else:
            hidden = self._forward(inputs)
            if not len(inputs.logits_rows):
                return None
            hidden = hidden[to_device(inputs.logits_rows, hidden.device)]
        return self._sample(self._model.compute_logits(hidden), inputs, rows)

    def _sample_by_graph(self, choice: Choice, num_seqs: int, rows: Rows) -> Sampled | None:
        numbers = sampling_rows(rows) if rows and choice is Choice.RANDOM else None
        tokens = self._graphs.sample(num_seqs, choice, numbers)
        return Sampled(tokens) if rows else None

    def _forward(self, inputs: StepInputs) -> Tensor:
        device = self._model.device
        input_ids = to_device(inputs.input_ids, device)
        if inputs.carried is not None:
            decodes = input_ids[: len(inputs.carried)]
            decodes.copy_(carry_over(decodes, to_device(inputs.carried, device), self._tokens))
        positions = to_device(inputs.positions, device)
        return self._model.forward(input_ids, positions, self._kv_caches, inputs.metadata(device))

    def _sample(self, logits: Tensor, inputs: StepInputs, rows: Rows) -> Sampled | None:
        tokens, sampled = self._tokens[: len(logits)], None
        if rows:
            has_penalties = any(row.token_counts is not None for row in rows)
            pending = self._pending(inputs) if has_penalties else None
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
    for seq, _, draft in caught_up:
        num_right = 0
        while num_right < len(draft) and tokens[start + num_right].token_id == draft[num_right]:
            num_right += 1
        found.append((seq, tokens[start : start + num_right + 1]))
        start += len(draft) + 1
    return found
