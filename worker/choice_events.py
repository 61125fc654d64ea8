"""What the events of a job with several choices say, and those of a job with one."""

from typing import Any

from ingine.contract.events import TokensEvent
from ingine.engine.outputs import FinishReason, SeqOutput
from ingine.errors import EngineError
from ingine.message import joined
from ingine.worker.jobs import RunningJob

_COMPLETE = tuple(reason for reason in FinishReason if reason.is_complete)


def tokens_event(job: RunningJob, output: SeqOutput) -> TokensEvent:
    """The next event of a job's log, with the tokens of `output`. Raises EngineError for tokens that do not
    continue the earlier ones.
    """
    choice = job.choices[output.index] if job.choices else None
    begins = output.position - len(output.token_ids)
    if begins != (job.sent.end if choice is None else choice.sent):
        raise EngineError(f"the tokens for {job.id} do not continue its earlier ones")
    event = TokensEvent(
        job.sent.end + len(output.token_ids),
        output.token_ids,
        output.text,
        output.logprobs,
        prompt_logprobs=output.prompt_logprobs,
    )
    delta = output.delta
    if choice is not None:
        event.index, event.choice_position = output.index, output.position
        choice.sent = output.position
        if output.finish_reason in _COMPLETE:
            event.text += output.final_text
            delta = joined(delta, output.final_delta)
            event.message = output.message and output.message.to_openai()
            event.finish_reason, event.stop_reason = str(output.finish_reason), output.stop_reason
    if job.parses_message:
        event.delta = {} if delta is None else delta.to_openai()
    return event


def choice_ends(job: RunningJob, *, with_text: bool) -> list[dict[str, Any]]:
    """Return `TerminalEvent.choices`. with_text: the log has all tokens to which held-back text and deltas
    belong.
    """
    ends = []
    for index, choice in enumerate(job.choices):
        end = {"index": index, "num_output_tokens": choice.committed}
        last = choice.last_output
        reason, stop_reason, more = choice.finish_reason, choice.stop_reason, {}
        if reason is None:
            reason = str(FinishReason.ABORT)
            if with_text and last is not None:
                reason, more = str(last.finish_reason), held_back(job, last)
                stop_reason = last.stop_reason if last.finish_reason in _COMPLETE else None
        end["finish_reason"] = reason
        if stop_reason is not None:
            end["stop_reason"] = stop_reason
        ends.append(end | more)
    return ends


def held_back(job: RunningJob, output: SeqOutput) -> dict[str, Any]:
    """Return `text`, `delta` and `message` of the last output of a choice, if no tokens event has ended it:
    each only if there is any. The delta is empty if what was held back is text alone.
    """
    fields = {
        "text": output.final_text,
        "delta": output.final_delta and output.final_delta.to_openai(),
        "message": output.message and output.message.to_openai(),
    }
    held = {name: value for name, value in fields.items() if value}
    if job.parses_message and "text" in held:
        held.setdefault("delta", {})
    return held
