"""One sequence inside the engine: its tokens, how far their KV is computed, and in which blocks it lies."""

from array import array
from collections.abc import Iterator
from collections.abc import Sequence as Tokens
from dataclasses import dataclass
from typing import Any

import numpy as np

from ingine.engine.grammar.state import GrammarState
from ingine.engine.outputs import FinishReason, SeqOutput
from ingine.engine.request import EngineRequest
from ingine.engine.schedule.bad_words import BadWords
from ingine.engine.schedule.choice_group import ChoiceGroup
from ingine.engine.schedule.drafter import Drafter
from ingine.engine.schedule.suffix_drafter import SuffixDrafter
from ingine.engine.schedule.token_counts import TokenCounts
from ingine.engine.text.detokenizer import TokenBytes
from ingine.engine.text.message_text import MessageText
from ingine.engine.text.output_text import OutputText
from ingine.errors import ErrorCode
from ingine.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class LogitsProcessing:
    """A request's lists as the arrays that each step needs, so that no step iterates over the lists."""

    end_token_ids: np.ndarray
    """[num_end_token_ids] int64: the tokens that `min_tokens` forbids."""
    bias_token_ids: np.ndarray
    """[num_biases] int64."""
    biases: np.ndarray
    """[num_biases] float32."""
    allowed_token_ids: np.ndarray | None
    """[num_allowed] int64, each once; None: all."""
    bad_words: BadWords | None

    @classmethod
    def of(
        cls, params: SamplingParams, end_token_ids: frozenset[int], bad_words: Tokens[Tokens[int]] = ()
    ) -> "LogitsProcessing":
        bias, allowed = params.logit_bias or {}, params.allowed_token_ids
        return cls(
            np.array(list(end_token_ids), dtype=np.int64),
            np.array(list(bias), dtype=np.int64),
            np.array(list(bias.values()), dtype=np.float32),
            None if allowed is None else np.unique(np.array(allowed, dtype=np.int64)),
            BadWords(bad_words) if bad_words else None,
        )

    @property
    def restricts(self) -> bool:
        """Whether some tokens are forbidden, beside those that `min_tokens` forbids."""
        return self.allowed_token_ids is not None or self.bad_words is not None


class Sequence:
    """A request's prompt and output tokens, `token_ids`, of which the first `num_computed_tokens` have KV.

    Output tokens of an earlier attempt pass through the same `append` as sampled ones. So text, stop strings
    and token counts are in the same state as without the interruption.
    """

    def __init__(
        self,
        request: EngineRequest,
        *,
        seed: int,
        sort_key: tuple[float, int],
        max_num_tokens: int,
        eos_token_ids: frozenset[int] = frozenset(),
        tokenizer: TokenBytes | None = None,
        index: int = 0,
        group: ChoiceGroup | None = None,
    ):
        """seed: of the random draws, since `request.params.seed` may be None. sort_key: the place in the
        scheduler's order, see `ingine.engine.schedule.scheduler`; unique. max_num_tokens: the most tokens of
        prompt and output together that the engine can hold. index, group: the choice that this is, and the
        request's choices; None for a request of one.
        """
        params = request.params
        self.seq_id = request.seq_id
        self.index = index
        self.group = group
        self.tenant = request.tenant
        self.params = params
        self.seed = seed
        self.sort_key = sort_key
        self.token_ids = list(request.prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        committed = request.output_of(index)
        self.output_text = OutputText(
            params,
            # An engine with a higher limit may have generated more: all of it is part of text and message.
            max_tokens=max(max_num_tokens - self.num_prompt_tokens, len(committed)),
            eos_token_ids=eos_token_ids,
            tokenizer=tokenizer,
            message_text=MessageText.of(request.message, index, tokenizer, params),
        )
        self.max_num_tokens = self.num_prompt_tokens + self.output_text.max_tokens

        self.num_pending_tokens = 0
        """Tokens that the step in flight samples. They count as present, but are not in `token_ids` yet."""
        self.num_computed_tokens = 0
        self.num_cached_tokens: int | None = None
        self.block_table = array("i")  # numpy copies an array at once, and a list item by item
        self.block_hashes: list[bytes] = []
        self.num_hashed_blocks = 0

        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self.error_code: ErrorCode | None = None
        self.processing = LogitsProcessing.of(
            params, self.output_text.end_token_ids, request.bad_words_token_ids
        )
        penalties = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
        has_penalties = penalties != (1, 0, 0)
        self.token_counts = TokenCounts(self.token_ids) if has_penalties else None
        self._has_plain_params = not (
            has_penalties
            or params.logit_bias
            or params.logprobs is not None
            or params.structured_outputs is not None
            or self.processing.restricts
        )
        self.prompt_logprobs: list[dict | None] | None = None
        """Those of the first prompt tokens, until the first output token takes them along. Only choice 0 has
        them."""
        if params.prompt_logprobs is not None and index == 0 and not request.output_token_ids:
            self.prompt_logprobs = [None]
        self.drafter: Drafter | SuffixDrafter | None = None
        self.grammar: GrammarState | None = None
        """The state of a constrained sequence after its output tokens, once its grammar is compiled."""
        self.takes_forced_drafts = True
        """Whether tokens that the grammar forces may be drafted."""
        self._replay(committed)
        if index in request.ended_choices and self.finish_reason is None:
            self.finish(FinishReason.LENGTH)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) + self.num_pending_tokens - self.num_computed_tokens

    @property
    def is_at_limit(self) -> bool:
        """Whether the pending token is the last one that the length limits allow."""
        return len(self.token_ids) + self.num_pending_tokens >= self.max_num_tokens

    @property
    def is_plain(self) -> bool:
        """Whether the next token depends only on logits, temperature, min_p, top_k and top_p."""
        return self._is_plain_at(self.num_output_tokens + self.num_pending_tokens)

    @property
    def needs_prompt_logprobs(self) -> bool:
        """Whether there are prompt tokens whose requested log probabilities are not known yet."""
        return self.prompt_logprobs is not None and len(self.prompt_logprobs) < self.num_prompt_tokens

    def add_prompt_logprobs(self, first: int, entries: list[dict]) -> None:
        """Take the log probabilities of the prompt tokens from position `first` on. Some may be known: a
        preempted sequence computes its prompt again.
        """
        if self.prompt_logprobs is None:
            return
        for entry in entries[len(self.prompt_logprobs) - first :]:
            self.output_text.add_prompt_token_bytes(entry)
            self.prompt_logprobs.append(entry)

    @property
    def output_tail(self) -> list[int]:
        """The last output tokens, as many as decide what `bad_words` forbids. Without the pending token."""
        bad_words = self.processing.bad_words
        if bad_words is None:
            return []
        return self.token_ids[max(self.num_prompt_tokens, self.num_tokens - bad_words.max_prefix_len) :]

    def allows_no_token(self, vocab_size: int) -> bool:
        """Whether the request's own parameters forbid every next token, with no token pending."""
        processing, forbidden = self.processing, np.zeros(vocab_size, dtype=bool)
        if processing.allowed_token_ids is not None:
            forbidden[:] = True
            forbidden[processing.allowed_token_ids] = False
        if processing.bad_words is not None:
            _forbid(forbidden, processing.bad_words.forbidden(self.output_tail))
        if self.grammar is not None:
            forbidden[~self.grammar.allowed(vocab_size)] = True
        elif self.num_output_tokens < self.params.min_tokens:
            _forbid(forbidden, processing.end_token_ids)
        return bool(forbidden.all())

    def append(self, token_id: int) -> str:
        """Take the next output token, and finish if it ends the output. Returns the text now certain."""
        self.token_ids.append(token_id)
        if self.token_counts is not None:
            self.token_counts.add(token_id)
        if self.grammar is not None:
            self.grammar.accept([token_id])
        output_text = self.output_text
        text = output_text.append(token_id)
        if output_text.finish_reason is not None:
            self.finish(output_text.finish_reason, output_text.stop_reason)
        return text

    def ahead(self, draft_token_ids: Tokens[int]) -> "Iterator[SequenceAhead]":
        """Yield the sequence's state with the first token of the draft, the first two, and so on."""
        counts, tail = self.token_counts, self.output_tail
        for index, token_id in enumerate(draft_token_ids, start=1):
            if self.processing.bad_words is not None:
                tail = [*tail, token_id]
            if counts is not None:
                counts = counts.copy()
                counts.add(token_id)
            yield SequenceAhead(
                params=self.params,
                seed=self.seed,
                num_output_tokens=self.num_output_tokens + index,
                token_counts=counts,
                processing=self.processing,
                is_plain=self._is_plain_at(self.num_output_tokens + index),
                output_tail=tail,
            )

    def finish(
        self,
        reason: FinishReason,
        stop_reason: int | str | None = None,
        error_code: ErrorCode | None = None,
    ) -> None:
        self.finish_reason = reason
        self.stop_reason = stop_reason
        self.error_code = error_code

    def output(
        self,
        token_ids: list[int],
        text: str = "",
        logprobs: list[dict] | None = None,
        *,
        others_run: bool = False,
    ) -> SeqOutput:
        """The output of a step; once the sequence has finished, with the rest of text and message."""
        prompt_logprobs = None
        if token_ids:
            prompt_logprobs, self.prompt_logprobs = self.prompt_logprobs, None
        output = SeqOutput(
            seq_id=self.seq_id,
            position=self.num_output_tokens,
            token_ids=token_ids,
            text=text,
            num_prompt_tokens=self.num_prompt_tokens,
            num_cached_tokens=self.num_cached_tokens or 0,
            logprobs=logprobs,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            error_code=self.error_code,
            index=self.index,
            others_run=others_run,
            prompt_logprobs=prompt_logprobs,
        )
        message_text = self.output_text.message_text
        if message_text is not None:
            output.delta = message_text.take_delta()
        if self.finish_reason is None:
            return output
        output.final_text = self.output_text.flush()
        if message_text is not None:
            output.final_delta = message_text.take_delta()
            if self.finish_reason.is_complete:
                output.message = message_text.message()
                output.finish_reason = FinishReason(message_text.finish_reason(self.finish_reason))
        return output

    def _is_plain_at(self, position: int) -> bool:
        return self._has_plain_params and position >= self.params.min_tokens

    def _replay(self, output_token_ids: Tokens[int]) -> None:
        for token_id in output_token_ids:
            if self.finish_reason is not None:
                break
            self.append(token_id)
        if self.output_text.message_text is not None:
            self.output_text.message_text.take_delta()  # the earlier attempt has returned it
        # Another version may have gone on behind what ends the output here. All stay part of it.
        self.token_ids.extend(output_token_ids[self.num_output_tokens :])


def _forbid(forbidden: np.ndarray, token_ids: np.ndarray) -> None:
    forbidden[token_ids[token_ids < len(forbidden)]] = True


@dataclass(slots=True)
class SequenceAhead:
    """The state of a sequence after a draft token, as far as sampling needs it."""

    params: SamplingParams
    seed: int
    num_output_tokens: int
    token_counts: TokenCounts | None
    processing: LogitsProcessing
    is_plain: bool
    output_tail: list[int]
    num_pending_tokens: int = 0


def make_choices(
    request: EngineRequest,
    block_size: int,
    *,
    seed: int,
    sort_keys: Iterator[tuple[float, int]],
    **options: Any,
) -> list[Sequence]:
    """Return the sequences of a request, one for each choice. Choice i has the seed of a request with
    `seed` + i. options: arguments of `Sequence`.
    """
    num_choices = request.params.n
    group = ChoiceGroup(len(request.prompt_token_ids), block_size) if num_choices > 1 else None
    return [
        Sequence(
            request,
            seed=(seed + index) % 2**63,
            sort_key=next(sort_keys),
            index=index,
            group=group,
            **options,
        )
        for index in range(num_choices)
    ]
