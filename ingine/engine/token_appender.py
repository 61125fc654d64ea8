"""What becomes of the tokens that a step has sampled."""

from ingine.engine.grammar.pool import GrammarPool
from ingine.engine.outputs import FinishReason, SeqOutput
from ingine.engine.request_table import RequestTable
from ingine.engine.sample.sampler import SampledToken
from ingine.engine.schedule.scheduler import Scheduler
from ingine.engine.schedule.sequence import Sequence
from ingine.errors import ErrorCode


class TokenAppender:
    """Appends sampled tokens to their sequences, and ends or restarts those that have no next token."""

    def __init__(
        self, requests: RequestTable, scheduler: Scheduler, grammars: GrammarPool, *, vocab_size: int
    ):
        self._requests = requests
        self._scheduler = scheduler
        self._grammars = grammars
        self._vocab_size = vocab_size
        self.num_output_tokens = 0
        self.num_accepted_tokens = 0
        """Drafted by speculation; see `EngineStats`."""

    def append(self, seq: Sequence, sampled: list[SampledToken], *, is_guessed: bool) -> list[SeqOutput]:
        """Append sampled tokens to their sequence, up to its end. Returns its output, if there is anything
        new, after those of other choices that end with it. is_guessed: speculation made the draft, if any.
        """
        token_ids, text, logprobs = [], "", []
        for token in sampled:
            if token.token_id is None:
                break
            token_ids.append(token.token_id)
            if token.logprobs is not None:
                seq.output_text.add_token_bytes(token.logprobs)
                logprobs.append(token.logprobs)
            text += seq.append(token.token_id)
            if seq.finish_reason is not None:
                break
        self.num_output_tokens += len(token_ids)
        # After an accepted draft the next step finds whether there really is nothing to choose from.
        if token.token_id is None and not (token_ids and seq.grammar is not None):
            self._handle_no_token(seq)
        elif len(token_ids) > 1:
            self.num_accepted_tokens += is_guessed * (len(token_ids) - 1)
            self._scheduler.accept(seq)
        if seq.finish_reason is not None:
            return self._requests.end(seq, token_ids, text, logprobs or None)
        return [seq.output(token_ids, text, logprobs or None)] if token_ids else []

    def _handle_no_token(self, seq: Sequence) -> None:
        """End a sequence for which no token could be chosen: its grammar or its parameters forbid all, or its
        logits are not finite. If drafts may be the cause of the latter, restart it without them.
        """
        if seq.grammar is not None and seq.grammar.is_in_doubt:
            self._requests.compile_again(seq, self._grammars.decide(seq.grammar))
            return
        if seq.grammar is not None and seq.grammar.error is not None:
            seq.finish(FinishReason.ERROR, seq.grammar.error, ErrorCode.GRAMMAR_FAILED)
            return
        if seq.allows_no_token(self._vocab_size):
            restrictions = "bad_words, allowed_token_ids and min_tokens"
            if seq.grammar is not None:
                restrictions = "structured_outputs, " + restrictions
            seq.finish(
                FinishReason.ERROR,
                f"{restrictions} leave no token to choose after output token {seq.num_output_tokens}",
                ErrorCode.NO_ALLOWED_TOKEN,
            )
            return
        # With asynchronous scheduling nothing is drafted, and the step in flight has gone on from this one.
        has_forced_drafts = seq.grammar is not None and seq.takes_forced_drafts
        if seq.drafter is not None or (has_forced_drafts and self._scheduler.max_forced_draft):
            self._scheduler.start_over_without_drafts(seq)
            return
        seq.finish(FinishReason.ERROR, "the model's logits are not finite", ErrorCode.ENGINE_ERROR)
        self._scheduler.block_manager.uncache(seq)
