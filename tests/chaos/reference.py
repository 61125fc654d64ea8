"""The uninterrupted run: makes the model, and its answer to each request without faults."""

from pathlib import Path

from tests.chaos.messages import finish_reason
from tests.chaos.outputs import Answer, Output, write_answers
from tests.chaos.requests import Request, requests

MIN_MARGIN = 1e-4
"""Minimum lead of the best token's logprob. Batches differ by some 1e-6, so they cannot change the choice."""


def run(*, model: str, answers: str) -> None:
    """Make the model, and write the answers."""
    import torch  # not at the top: the harness, which only reads the answers, needs none

    from tests.tiny_models import make_tiny_model

    torch.set_num_threads(1)
    make_tiny_model(Path(model))
    write_answers(Path(answers), uninterrupted(model))


def uninterrupted(model: str) -> list[Answer]:
    """Generate the answers: each choice by a request of its own, with its own seed. Raises ValueError if a
    greedy choice is so close that two batches could differ."""
    from ingine.engine.config import EngineConfig
    from ingine.engine.engine import Engine

    engine = Engine(EngineConfig(model=model, dtype="float32", device="cpu", kv_cache_bytes=16 << 20))
    asked = requests()
    answers = [Answer([Output() for _ in range(request.num_choices)]) for request in asked]
    for number, request in enumerate(asked):
        for index in range(request.num_choices):
            _add(engine, f"{number}:{index}", request, index)
            if request.is_chat:
                _add(engine, f"{number}:{index}:marked", request, index, skip_special_tokens=False)
    while engine.has_unfinished:
        for out in engine.step():
            number, index, *marked = out.seq_id.split(":")
            request, answer = asked[int(number)], answers[int(number)]
            if marked:
                answer.outputs[int(index)].marked_text += out.text + out.final_text
            else:
                _take(answer, int(index), out, with_margin=request.is_plainly_greedy)
    for request, answer in zip(asked, answers, strict=True):
        for output in answer.outputs if request.is_chat else ():
            output.finish_reason = finish_reason(request, output.marked_text, output.finish_reason)
    return answers


def _add(engine, name: str, request: Request, index: int, **more) -> None:
    from ingine.contract.jobs import Job
    from ingine.engine.request import EngineRequest

    job = Job(id="reference", sampling=request.sampling, **request.input)
    more |= {"n": 1, "seed": request.sampling.get("seed", 0) + index}
    if request.is_plainly_greedy:
        more["logprobs"] = 2
    if index:  # choice 0 alone has those of the prompt
        more["prompt_logprobs"] = None
    params = job.sampling.model_copy(update=more)
    engine.add(EngineRequest(name, engine.limits.truncate(prompt_of(engine, job), params), params))


def prompt_of(engine, job) -> list[int]:
    """The token ids of a job's prompt or chat."""
    from ingine.engine.text.prompt_encoder import PromptEncoder
    from ingine.worker.prompts import conversation_of

    encoder = PromptEncoder(engine.tokenizer, engine.limits.max_num_tokens)
    return encoder.encode(job.prompt) if job.messages is None else encoder.encode_chat(conversation_of(job))


def _take(answer: Answer, index: int, out, *, with_margin: bool) -> None:
    for entry in out.logprobs or () if with_margin else ():
        (_, best), (_, second), *_ = entry["top"]
        if best - second < MIN_MARGIN:
            raise ValueError(f"request {out.seq_id} has a tie at {out.position}: change its prompt")
    output = answer.outputs[index]
    output.token_ids += out.token_ids
    output.text += out.text + out.final_text
    output.num_prompt_logprobs += out.prompt_logprobs is not None
    if out.finish_reason is not None:
        output.finish_reason, output.stop_reason = str(out.finish_reason), out.stop_reason
    if out.error_code is not None:
        answer.error, output.stop_reason = str(out.error_code), None
