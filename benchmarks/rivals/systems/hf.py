"""Hugging Face transformers. The option `mode` is sequential, padded or continuous."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

from benchmarks.rivals.protocol import Loaded, Recording, Request, serve

Generate = Callable[[PreTrainedModel, Sequence[Request], Recording], None]


def sequential(model: PreTrainedModel, requests: Sequence[Request], recording: Recording) -> None:
    """Run `generate` on one request after the other."""
    for index, request in enumerate(requests):
        output = model.generate(torch.tensor([request.prompt]), **_exactly(request.num_tokens))
        recording.tokens(index, output[0, len(request.prompt) :].tolist())


def padded(model: PreTrainedModel, requests: Sequence[Request], recording: Recording) -> None:
    """Run `generate` on all requests as one batch, padded on the left to the longest prompt."""
    longest = max(len(request.prompt) for request in requests)
    input_ids = torch.zeros(len(requests), longest, dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for row, request in enumerate(requests):
        input_ids[row, longest - len(request.prompt) :] = torch.tensor(request.prompt)
        mask[row, longest - len(request.prompt) :] = 1
    num_tokens = max(request.num_tokens for request in requests)
    outputs = model.generate(input_ids, attention_mask=mask, **_exactly(num_tokens))
    for index, request in enumerate(requests):
        recording.tokens(index, outputs[index, longest : longest + request.num_tokens].tolist())


def continuous(model: PreTrainedModel, requests: Sequence[Request], recording: Recording) -> None:
    """Run `generate_batch` with as much KV memory and budget as these requests can use."""
    page_size = 32
    pages = sum(-(-(len(r.prompt) + r.num_tokens) // page_size) for r in requests)
    (num_tokens,) = {request.num_tokens for request in requests}
    outputs = model.generate_batch(
        [request.prompt for request in requests],
        generation_config=GenerationConfig(
            do_sample=False, max_new_tokens=num_tokens, eos_token_id=-1, pad_token_id=0
        ),
        continuous_batching_config=ContinuousBatchingConfig(
            page_size=page_size, num_blocks=pages + 8, max_batch_tokens=2048, allow_block_sharing=False
        ),
    )
    for index, output in enumerate(outputs.values()):
        recording.tokens(index, output.generated_tokens)


MODES: dict[str, Generate] = {"sequential": sequential, "padded": padded, "continuous": continuous}


class HuggingFace:
    def __init__(self, model: PreTrainedModel, generate: Generate):
        self._model, self._generate = model, generate

    def run(self, requests: Sequence[Request]) -> Recording:
        recording = Recording(requests)
        self._generate(self._model, requests, recording)
        return recording


def _exactly(num_tokens: int) -> dict[str, Any]:
    return {
        "do_sample": False,
        "max_new_tokens": num_tokens,
        "pad_token_id": 0,
    }


def load(model: str, options: dict[str, Any]) -> Loaded:
    hf_model = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.bfloat16, attn_implementation="sdpa", trust_remote_code=False
    ).eval()
    hf_model.generation_config.eos_token_id = None  # the end of sequence is ignored
    return Loaded(
        HuggingFace(hf_model, MODES[options["mode"]]),
        versions={"transformers": transformers.__version__, "torch": torch.__version__},
        settings={
            **options,
            "dtype": "bfloat16",
            "attention": "sdpa",
            "torch_threads": torch.get_num_threads(),
        },
    )


if __name__ == "__main__":
    serve(load)
