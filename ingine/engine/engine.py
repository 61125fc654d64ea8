"""The engine: takes requests, and generates their tokens one step at a time."""

import logging
import random
import time
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from itertools import count

from ingine.engine.build import join_others, load, make_runner
from ingine.engine.config import EngineConfig, numerics
from ingine.engine.grammar.pool import GrammarPool
from ingine.engine.grammar.state import GrammarState
from ingine.engine.grammar.vocabulary import GrammarVocabulary
from ingine.engine.limits import RequestLimits
from ingine.engine.models.interface import Model
from ingine.engine.outputs import EngineStats, SeqOutput
from ingine.engine.request import EngineRequest
from ingine.engine.request_table import RequestTable
from ingine.engine.run.device import resolve_limits
from ingine.engine.run.model_runner import ForwardPass, StepResult
from ingine.engine.sample.sampler import SampledToken
from ingine.engine.schedule.block_manager import BlockManager
from ingine.engine.schedule.scheduler import MAX_FORCED_DRAFT, ScheduledBatch, Scheduler
from ingine.engine.schedule.sequence import Sequence, make_choices
from ingine.engine.schedule.speculation import Speculator
from ingine.engine.step_trace import log_step
from ingine.engine.text.bad_words import encode_bad_words
from ingine.engine.text.tokenizer import Tokenizer, required
from ingine.engine.token_appender import TokenAppender
from ingine.errors import EngineError, ErrorCode, InvalidRequest

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _StepInFlight:
    batch: ScheduledBatch
    result: StepResult
    launched_at: float
    """The time of the launch, by `time.perf_counter`."""


class Engine:
    """Generates tokens for many sequences in one continuous batch, a step at a time.

    The engine belongs to the thread that builds it. Other threads may use only `limits` and the tokenizer.

    If the model raises, `step` raises too, and the step has no effect: no sequence has advanced, and no block
    that it wrote to is cached. Calling `step` again retries it. To give up instead, `abort` the
    `running_seq_ids`, which include every sequence of the failed step; waiting sequences are unaffected.
    EngineError means that the engine is broken, because a rank is gone or a step was lost on the device. No
    further step is possible then.

    With asynchronous scheduling, `step` schedules the next step while one is in flight, so the outputs that
    it returns are one step old. Nothing else differs. If the next step cannot be launched, `step` returns the
    outputs of the one in flight, and its next call raises.
    """

    def __init__(
        self, config: EngineConfig, *, model: Model | None = None, tokenizer: Tokenizer | None = None
    ):
        """Load `config.model`, unless a loaded `model` is given. A given model brings its ranks and has no
        sampling defaults. Its text is "" unless a `tokenizer` is given too.
        """
        self._parallel = join_others(config) if model is None else model.parallel
        if model is None:
            model, tokenizer, sampling_defaults = load(config, tokenizer, self._parallel)
        else:
            sampling_defaults = {}
        self.tokenizer = tokenizer
        self.model_config = model.config
        self._eos_token_ids = frozenset(model.config.eos_token_ids)
        if tokenizer is not None:  # a chat model's config may name only the base model's end token
            self._eos_token_ids |= tokenizer.eos_token_ids
        config = resolve_limits(config, model.device, model.config.max_position_embeddings)
        self._runner, num_blocks = make_runner(config, model, self._parallel)
        self.limits = RequestLimits(
            max_model_len=config.max_model_len,
            num_kv_tokens=num_blocks * config.block_size,
            vocab_size=model.config.vocab_size,
            sampling_defaults=sampling_defaults,
            has_text=tokenizer is not None,
            eos_token_ids=sorted(self._eos_token_ids),
            max_choices=config.max_choices,
        )
        self.grammars = GrammarPool(self._make_vocabulary)
        self.max_model_len = self.limits.max_num_tokens
        if self.max_model_len < config.max_model_len:
            logger.warning("KV memory limits sequences to %d tokens", self.max_model_len)
        self.config = config
        """The config as given, with the engine's choice for every limit that was None."""
        self._blocks = BlockManager(
            num_blocks, config.block_size, enable_prefix_caching=config.enable_prefix_caching
        )
        self._speculator = Speculator.of(config)
        self._scheduler = Scheduler(
            self._blocks,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            speculator=self._speculator,
            max_forced_draft=0 if config.async_scheduling else MAX_FORCED_DRAFT,
        )
        self.numerics = numerics(config, model.dtype, model.numerics())
        self._requests = RequestTable(self._scheduler, self._end_drafting)
        self._appender = TokenAppender(
            self._requests, self._scheduler, self.grammars, vocab_size=self.limits.vocab_size
        )
        self._in_flight: _StepInFlight | None = None
        self._settled_at = 0.0
        """When the last step was settled, by `time.perf_counter`."""
        self._launch_error: Exception | None = None
        """The next `step` raises it."""
        self._broken: EngineError | None = None
        self._seeds = random.Random(config.seed)
        self._arrivals = count()
        self._num_prompt_tokens = 0
        self._num_draft_tokens = 0

    def add(self, request: EngineRequest) -> None:
        """Queue a request, as one sequence for each choice. The caller has validated it with `limits`.

        If its `output_token_ids` have already reached the end of the output, the next `step` returns that
        end. Raises InvalidRequest for a `seq_id` that is in use, and for a bad word without tokens.
        """
        seq_id, params = request.seq_id, request.params
        if seq_id in self._requests:
            raise InvalidRequest(ErrorCode.DUPLICATE_ID, f"a sequence {seq_id!r} exists already")
        if params.bad_words and not request.bad_words_token_ids:
            words = encode_bad_words(required(self.tokenizer), params.bad_words)
            request = replace(request, bad_words_token_ids=words)
        arrival_time = time.time() if request.arrival_time is None else request.arrival_time
        priority_s = request.priority * self.config.priority_ageing_s
        seqs = make_choices(
            request,
            self.config.block_size,
            seed=self._seeds.getrandbits(63) if params.seed is None else params.seed,
            sort_keys=((arrival_time + priority_s, number) for number in self._arrivals),
            max_num_tokens=self.max_model_len,
            eos_token_ids=self._eos_token_ids,
            tokenizer=self.tokenizer,
        )
        self._num_prompt_tokens += len(request.prompt_token_ids)
        if self._speculator is not None:
            for seq in seqs:
                self._speculator.begin(seq)
        begin_grammar = None
        if params.structured_outputs is not None:
            begin_grammar = partial(self._begin_grammar, request)
        self._requests.add(seqs, begin_grammar)

    def abort(self, seq_id: str) -> list[SeqOutput]:
        """End a request, whatever its state. Returns the last output of each unfinished sequence; none if
        there is no such request.
        """
        return self._requests.abort(seq_id)

    def step(self, *, alone: str | None = None) -> list[SeqOutput]:
        """Compute one batch. Returns the new output of each sequence that has any; a sequence whose prefill
        is not complete has none.

        alone: compute only this one of `running_seq_ids`, to find out which request of a batch makes the
        model raise. While a step is in flight, this computes nothing, and returns the outputs of that step.
        """
        self._raise_pending_error()
        if alone is not None and self._in_flight is not None:
            return self.drain()
        scheduler = self._scheduler
        self._requests.take_compiled()
        batch = scheduler.schedule() if alone is None else scheduler.schedule_alone(alone)
        if not batch.seqs:
            outputs = self._requests.report_ended_without_step() + self.drain()
            if not outputs:
                self._requests.compiling.wait()
            return outputs
        if self.config.async_scheduling and alone is None:
            return self._step_ahead(batch)
        return self._step_at_a_time(batch)

    def drain(self) -> list[SeqOutput]:
        """Wait for the step in flight, if there is one. Returns its outputs, as `step` would have."""
        step, self._in_flight = self._in_flight, None
        return self._settle(step)

    def follow(self) -> None:
        """Compute what rank 0 of tensor parallelism computes, until it closes. Called on the other ranks."""
        self._runner.follow()

    def close(self) -> None:
        """Release the other ranks, if there are any, and end the threads. The engine cannot compute after
        that.
        """
        self.grammars.close()
        self._runner.close()
        self._parallel.close()

    @property
    def has_unfinished(self) -> bool:
        return len(self._requests) > 0

    @property
    def running_seq_ids(self) -> list[str]:
        """The requests of the sequences that have been admitted to the batch, most urgent first."""
        return list(dict.fromkeys(seq.seq_id for seq in self._scheduler.running))

    def stats(self) -> EngineStats:
        scheduler, blocks, num_compiling = self._scheduler, self._blocks, len(self._requests.compiling)
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting) + num_compiling,
            num_blocks=blocks.num_blocks,
            num_free_blocks=blocks.num_free_blocks,
            kv_usage=1 - blocks.num_free_blocks / blocks.num_blocks,
            prefix_cache_hit_tokens=scheduler.prefix_cache_hit_tokens,
            prefix_cache_query_tokens=scheduler.prefix_cache_query_tokens,
            num_preemptions=scheduler.num_preemptions,
            num_prompt_tokens=self._num_prompt_tokens,
            num_output_tokens=self._appender.num_output_tokens,
            num_draft_tokens=self._num_draft_tokens,
            num_accepted_tokens=self._appender.num_accepted_tokens,
            num_compiling=num_compiling,
        )

    def check_integrity(self) -> None:
        """Raise EngineError unless every sequence is in exactly one queue and every block accounted for."""
        self._requests.check_integrity()
        self._blocks.check_integrity(self._scheduler.running)

    def _step_at_a_time(self, batch: ScheduledBatch) -> list[SeqOutput]:
        """Compute a batch. Returns its outputs."""
        launched_at = time.perf_counter()
        forward_pass = self._runner.forward(batch)
        result = self._runner.sample(forward_pass)
        self._scheduler.advance(batch)
        step = _StepInFlight(batch, result, launched_at)
        return self._requests.report_ended_without_step() + self._settle(step)

    def _step_ahead(self, batch: ScheduledBatch) -> list[SeqOutput]:
        """Launch a batch behind the step in flight, if there is one. Returns the outputs of that step.

        Neither `forward` nor `sample` of the batch knows the tokens of the step in flight. A `sample` that
        needs them, since a sequence has a grammar, runs after that step is settled, while the device runs
        `forward`.
        """
        launched_at, before = time.perf_counter(), self._in_flight
        outputs: list[SeqOutput] = []
        try:
            forward_pass = self._runner.forward(batch)
            if forward_pass.needs_last_tokens:
                outputs = self._drain_before_sampling(forward_pass)
            result = self._runner.sample(forward_pass)
            self._scheduler.advance(batch)
        except Exception as error:
            # If a rank is gone, the step in flight may never complete.
            if before is None or isinstance(error, EngineError):
                raise
            self._launch_error = error
            return outputs + self.drain()
        before, self._in_flight = self._in_flight, _StepInFlight(batch, result, launched_at)
        return outputs + self._requests.report_ended_without_step() + self._settle(before)

    def _drain_before_sampling(self, forward_pass: ForwardPass) -> list[SeqOutput]:
        try:
            return self.drain()
        except Exception:
            self._runner.abandon(forward_pass)
            raise

    def _settle(self, step: _StepInFlight | None) -> list[SeqOutput]:
        """Wait for a step, if there is one, and append its tokens to their sequences. Returns its outputs."""
        if step is None:
            return []
        sampled = self._wait(step)
        for seq, first, entries in step.result.prompt_logprobs():
            seq.add_prompt_logprobs(first, entries)
        self._observe(step)
        self._scheduler.settle(step.batch)
        caught_up = {*step.batch.caught_up}
        outputs = [
            output
            for seq, tokens in sampled
            # A sequence that was aborted, has ended or was removed meanwhile gets nothing from this step.
            if seq.finish_reason is None and seq in caught_up
            for output in self._appender.append(seq, tokens, is_guessed=seq not in step.batch.forced)
        ]
        log_step(step.batch, outputs, self.stats, max(step.launched_at, self._settled_at))
        self._settled_at = time.perf_counter()
        return outputs

    def _wait(self, step: _StepInFlight) -> list[tuple[Sequence, list[SampledToken]]]:
        try:
            return step.result.wait()
        except Exception as error:
            self._broken = EngineError(f"a step was lost in flight: {error!r}")
            raise self._broken from error

    def _raise_pending_error(self) -> None:
        if self._broken is not None:
            raise self._broken
        error, self._launch_error = self._launch_error, None
        if error is not None:
            raise error

    def _observe(self, step: _StepInFlight) -> None:
        if self._speculator is not None and step.batch.is_decode:
            seconds = time.perf_counter() - step.launched_at
            self._speculator.observe(len(step.batch.seqs), step.batch.num_draft_tokens, seconds)
        self._num_draft_tokens += step.batch.num_guessed_tokens

    def _end_drafting(self, seq: Sequence) -> None:
        if self._speculator is not None:
            self._speculator.end(seq)

    def _begin_grammar(self, request: EngineRequest, seq: Sequence) -> Future[GrammarState]:
        return self.grammars.begin(request, seq.index, self._eos_token_ids)

    def _make_vocabulary(self) -> GrammarVocabulary:
        return GrammarVocabulary(
            required(self.tokenizer),
            vocab_size=self.model_config.vocab_size,
            eos_token_ids=self._eos_token_ids,
        )
