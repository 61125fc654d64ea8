"""Runs the model on a scheduled batch, and samples a token for each sequence that has caught up.

A step has two halves, `forward` and `sample`. Both only enqueue work; `StepResult.wait` waits for the result.
The sampled tokens also stay on the device, so that the next step can be enqueued before the host has read
them.
"""

from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ingine.engine.communication.parallel import SINGLE, TensorParallel
from ingine.engine.communication.transfer import to_device
from ingine.engine.grammar.masks import ConstrainedRows, MaskFiller, StepMasks
from ingine.engine.kernels.attention import KVCache
from ingine.engine.models.interface import Model
from ingine.engine.run.graphs import Choice, DecodeGraphs, carry_over
from ingine.engine.run.prompt_scores import PromptScores, Scored, score_prompts
from ingine.engine.run.step_inputs import StepInputs, Work, in_order, pack
from ingine.engine.sample.sampler import Sampled, SampledToken, sample, sampling_rows
from ingine.engine.schedule.scheduler import ScheduledBatch
from ingine.engine.schedule.sequence import Sequence, SequenceAhead

Rows = list[Sequence | SequenceAhead]
"""The sequence that each row of logits is sampled for."""


@dataclass(slots=True)
class ForwardPass:
    """The first half of a step, in flight, with the inputs of the second half."""

    inputs: StepInputs
    choice: Choice | None
    """How a graph samples this step, if there are graphs; None: no graph can."""
    caught_up: list[Work]
    """The work that one token or more is sampled for. Empty on ranks other than 0, as `rows` is."""
    rows: Rows
    hidden: Tensor | None
    """[num_rows, hidden_size]: final hidden states of the tokens after which one is sampled; None if there
    are none. Valid until the next `ModelRunner.forward`."""
    constrained: list[ConstrainedRows]
    """The rows whose sequences have a grammar."""
    masks: Future[StepMasks] | None
    """Their masks, being filled since before the model was launched. None: `sample` fills them."""
    scored: Scored
    """The prompt tokens whose log probabilities are requested. Empty on ranks other than 0."""
    scored_hidden: Tensor | None
    """[num_scored, hidden_size]: final hidden states of the tokens before those; None if there are none."""

    @property
    def needs_last_tokens(self) -> bool:
        """Whether `sample` needs tokens that the step in flight samples: what a grammar allows depends on
        them."""
        return self.masks is None and any(
            one.seq.num_pending_tokens for one in self.caught_up if one.seq.grammar
        )


class StepResult:
    """A step in flight."""

    def __init__(self, sampled: Sampled | None, caught_up: list[Work], scores: PromptScores | None = None):
        self._sampled, self._caught_up, self._scores = sampled, caught_up, scores

    def prompt_logprobs(self) -> list[tuple[Sequence, int, list[dict]]]:
        """Wait for the log probabilities of prompt tokens, see `PromptScores.wait`."""
        return self._scores.wait() if self._scores else []

    def wait(self) -> list[tuple[Sequence, list[SampledToken]]]:
        """Wait for the sampled tokens. Returns the next token of each sequence that has caught up; with a
        draft, the next tokens up to the first one that differs from the draft.
        """
        return _split(self._sampled.wait(), self._caught_up) if self._sampled else []


class ModelRunner:
    """Runs the steps of one rank. With tensor parallelism, rank 0's runner is called for each step, and the
    other ranks `follow` it.
    """

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
        """`kv_caches` were allocated by `model`, with blocks of `block_size` tokens.

        tokens: [most tokens of a step] int64 on the model's device, into which each step samples; `graphs`
        were made with the same tensor.
        """
        self._model, self._kv_caches, self._block_size = model, kv_caches, block_size
        self._tokens = tokens
        self._graphs = graphs
        self._parallel = parallel
        self._rows_of_last_step: dict[Sequence, int] = {}
        self._mask_filler: MaskFiller | None = None

    @torch.inference_mode()
    def forward(self, batch: ScheduledBatch) -> ForwardPass:
        """Enqueue the model on a batch. If this or its `sample` raises, no sequence has advanced.

        `sample` has to follow before the next batch: other ranks go on to sampling without a message.
        """
        work = in_order(batch)
        inputs = pack(work, self._block_size, self._rows_of_last_step)
        caught_up = [one for one in work if one.catches_up]
        rows: Rows = []
        constrained: list[ConstrainedRows] = []
        for one in caught_up:
            if one.seq.grammar is not None:
                constrained.append(ConstrainedRows(len(rows), one.seq.grammar, one.draft))
            rows += [one.seq, *one.seq.ahead(one.draft)]
        scored = [(one.seq, one.scored) for one in work if one.scored]
        choice = _choice(rows)
        self._parallel.send((inputs, choice))
        masks = None
        if constrained and not any(one.seq.num_pending_tokens for one in caught_up):
            masks = self._masks().start(constrained)
        try:
            hidden, scored_hidden = self._forward(inputs)
        except Exception:
            self._parallel.abort()
            _wait_for(masks)
            raise
        return ForwardPass(inputs, choice, caught_up, rows, hidden, constrained, masks, scored, scored_hidden)

    @torch.inference_mode()
    def sample(self, forward_pass: ForwardPass) -> StepResult:
        """Enqueue sampling of the next tokens of the sequences that have caught up."""
        try:
            scores = self._score(forward_pass)
            sampled = self._sample(forward_pass)
        except Exception:
            self.abandon(forward_pass)
            raise
        self._rows_of_last_step = {one.seq: row for row, one in enumerate(forward_pass.caught_up)}
        return StepResult(sampled, forward_pass.caught_up, scores)

    def abandon(self, forward_pass: ForwardPass) -> None:
        """Give up a step between its halves. Other ranks wait for the second, so no step may follow."""
        self._parallel.abort()
        _wait_for(forward_pass.masks)

    def close(self) -> None:
        """End the thread that fills masks, if there is one. The next step with a mask starts another."""
        if self._mask_filler is not None:
            self._mask_filler.close()
            self._mask_filler = None

    @torch.inference_mode()
    def follow(self) -> None:
        """Take part in the steps of rank 0 until it closes."""
        while (message := self._parallel.receive()) is not None:
            inputs, choice = message
            hidden, scored_hidden = self._forward(inputs)
            forward_pass = ForwardPass(inputs, choice, [], [], hidden, [], None, [], scored_hidden)
            self._score(forward_pass)
            self._sample(forward_pass)

    # The steps below run on every rank.

    def _forward(self, inputs: StepInputs) -> tuple[Tensor | None, Tensor | None]:
        """Enqueue the model. Returns `ForwardPass.hidden` and `ForwardPass.scored_hidden`."""
        if self._is_replayed(inputs):
            return self._graphs.run_model(inputs), None
        device = self._model.device
        input_ids = to_device(inputs.input_ids, device)
        if inputs.carried is not None:
            decodes = input_ids[: len(inputs.carried)]
            decodes.copy_(carry_over(decodes, to_device(inputs.carried, device), self._tokens))
        positions = to_device(inputs.positions, device)
        hidden = self._model.forward(input_ids, positions, self._kv_caches, inputs.metadata(device))
        scored = None if inputs.scored_rows is None else hidden[to_device(inputs.scored_rows, device)]
        return hidden[to_device(inputs.logits_rows, device)] if len(inputs.logits_rows) else None, scored

    def _score(self, forward_pass: ForwardPass) -> PromptScores | None:
        """Enqueue the log probabilities of prompt tokens. Returns None if none are requested."""
        if forward_pass.scored_hidden is None:
            return None
        sampling = self._model.kernels.sampling
        return score_prompts(self._model, sampling, forward_pass.scored_hidden, forward_pass.scored)

    def _sample(self, forward_pass: ForwardPass) -> Sampled | None:
        """Enqueue sampling. Returns None if nothing is sampled, and on ranks other than 0."""
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
            needs_pending = any(
                row.token_counts is not None or row.processing.bad_words is not None for row in rows
            )
            pending = self._pending(forward_pass.inputs) if needs_pending else None
            masks = self._filled(forward_pass)
            sampled = sample(logits, rows, self._model.kernels.sampling, pending=pending, masks=masks)
            tokens.copy_(sampled.token_ids)
        self._parallel.broadcast(tokens)
        return sampled

    def _filled(self, forward_pass: ForwardPass) -> StepMasks | None:
        """Return the masks of a step; None if no sequence has a grammar."""
        if not forward_pass.constrained:
            return None
        if forward_pass.masks is not None:
            return forward_pass.masks.result()
        return self._masks().fill(forward_pass.constrained)

    def _masks(self) -> MaskFiller:
        if self._mask_filler is None:
            self._mask_filler = MaskFiller()
        return self._mask_filler

    def _pending(self, inputs: StepInputs) -> Tensor | None:
        """Return [num_rows] int64: the token of each row that the last step sampled and the host has not
        read; -1 for none.
        """
        if inputs.carried is None:
            return None
        # Only steps without drafts carry tokens over: there each row is the last token of a sequence.
        carried = np.full(len(inputs.query_lens), -1, dtype=np.int64)
        carried[: len(inputs.carried)] = inputs.carried
        last_tokens = np.cumsum(inputs.query_lens) - 1
        carried = to_device(carried[np.searchsorted(last_tokens, inputs.logits_rows)], self._tokens.device)
        return torch.where(carried >= 0, self._tokens[carried.clamp(min=0)], -1)


def _wait_for(masks: Future[StepMasks] | None) -> None:
    """Wait until the masks of a failed step are filled: until then the filler's thread uses the states."""
    if masks is not None:
        masks.exception()


def _choice(rows: Rows) -> Choice | None:
    """Return how a graph can sample `rows`; None if a row needs a logits processor or log probabilities."""
    if not all(row.is_plain for row in rows):
        return None
    return Choice.GREEDY if all(row.params.greedy for row in rows) else Choice.RANDOM


def _split(tokens: list[SampledToken], caught_up: list[Work]) -> list[tuple[Sequence, list[SampledToken]]]:
    """Split the sampled tokens by sequence, and drop those that follow a wrong draft token: they were sampled
    after a token that the sequence does not have.
    """
    found, start = [], 0
    for one in caught_up:
        draft, num_right = one.draft, 0
        while num_right < len(draft) and tokens[start + num_right].token_id == draft[num_right]:
            num_right += 1
        found.append((one.seq, tokens[start : start + num_right + 1]))
        start += len(draft) + 1
    return found
