"""Measures Hugging Face on the same device, shape and work: `generate` on one batch, and continuous
batching."""

import time
from collections.abc import Callable

import torch
from transformers import (
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    GenerationConfig,
    PreTrainedModel,
    Qwen2Config,
)

from benchmarks.gpu_check import streams
from benchmarks.gpu_check.cells import Cells, Figures
from benchmarks.gpu_check.plan import Plan
from benchmarks.gpu_check.random_model import MAX_POSITION_EMBEDDINGS, fill_randomly
from benchmarks.gpu_check.timing import synchronize

PAGE_SIZE = 256
"""Tokens of a page: the default, which has another name in each version."""

Generate = Callable[[PreTrainedModel, list[list[int]], int], Figures]


def run(plan: Plan, cells: Cells) -> None:
    model, context = _random_model(plan), plan.compared[1]
    # `generate_batch` comes last: a failure leaves the model with attention that `generate` cannot use.
    for name, generate in SYSTEMS.items():
        for batch in plan.streams:
            settings = {"batch": batch, "context": context, "num_new_tokens": plan.num_stream_tokens}
            cells.run(name, settings, _measure, model, generate, batch, plan)


def padded(model: PreTrainedModel, prompts: list[list[int]], num_tokens: int) -> Figures:
    """Run `generate` on one batch. Nothing is padded, since all prompts have the same length."""
    began = time.perf_counter()
    input_ids = torch.tensor(prompts, device=model.device)
    model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        do_sample=False,
        max_new_tokens=num_tokens,
        pad_token_id=0,
    )
    synchronize(model.device)
    wall_s = time.perf_counter() - began
    return {"wall_s": wall_s, "tokens_per_s": len(prompts) * num_tokens / wall_s}


def continuous(model: PreTrainedModel, prompts: list[list[int]], num_tokens: int) -> Figures:
    """Run `generate_batch` with enough pages for this work. Each call includes its setup, which counts for
    the wall time but not for the rate after the first token. It chooses graphs and attention itself.
    """
    pages = sum(-(-(len(prompt) + num_tokens) // PAGE_SIZE) for prompt in prompts)
    began = time.perf_counter()
    outputs = model.generate_batch(
        prompts,
        generation_config=GenerationConfig(
            do_sample=False, max_new_tokens=num_tokens, eos_token_id=-1, pad_token_id=0
        ),
        continuous_batching_config=ContinuousBatchingConfig(
            num_blocks=pages + 8, max_batch_tokens=2048, allow_block_sharing=False
        ),
        record_timestamps=True,
    )
    made = [len(output.generated_tokens) for output in outputs.values()]
    if made != [num_tokens] * len(prompts):  # it logs errors, and returns what it has
        raise RuntimeError(f"generate_batch made {sum(made)} of {num_tokens * len(prompts)} tokens")
    return streams.rates(began, [moment for output in outputs.values() for moment in output.timestamps])


SYSTEMS: dict[str, Generate] = {"hf generate": padded, "hf continuous batching": continuous}


def _measure(model: PreTrainedModel, generate: Generate, batch: int, plan: Plan) -> Figures:
    """Measure a call. The figures name the attention that the model uses meanwhile: `generate_batch` changes
    it and restores it."""
    prompts = streams.prompts(batch, plan.compared[1], plan.shape.vocab_size)
    seen: set[str] = set()
    hook = model.register_forward_pre_hook(lambda model, _: seen.add(model.config._attn_implementation))
    generate(model, prompts, 2)  # load and compile
    hook.remove()
    return {"attention": ", ".join(sorted(seen)), **generate(model, prompts, plan.num_stream_tokens)}


def _random_model(plan: Plan) -> PreTrainedModel:
    shape = plan.shape
    config = Qwen2Config(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        max_position_embeddings=MAX_POSITION_EMBEDDINGS,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.device(plan.device):
        model = AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, plan.dtype), attn_implementation="sdpa"
        )
    fill_randomly(dict(model.named_parameters()))
    return model.eval()
