"""Checks the exactness of the whole engine: tiny random models in float32 give the tokens that transformers
generates on the same device, however the scheduler cuts and mixes the work.
"""

import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.gpu_check.cells import Cells, Figures
from benchmarks.gpu_check.plan import Plan
from ingine.engine.config import EngineConfig
from ingine.engine.engine import Engine
from ingine.engine.kernels.select import REFERENCE, triton_kernels
from ingine.engine.models.decoder import Decoder
from ingine.engine.models.loader import load_model
from ingine.engine.request import EngineRequest
from ingine.sampling_params import SamplingParams
from tests.tiny_models import make_tiny_model

VOCAB_SIZE = 256
SEEDS = {"llama": 1, "qwen2": 0, "qwen3": 1, "mistral": 1}
"""Seeds of models without near ties on the way, which rounding would decide."""
WINDOW = 24
"""Sliding window of mistral: shorter than most prompts."""
SHORT_OF_MEMORY = "short of memory"
SHARED = "shared prefixes"
MIXES: dict[str, dict[str, Any]] = {
    "one at a time": {"max_num_seqs": 1, "max_num_batched_tokens": 256},
    SHARED: {"max_num_seqs": 2},
    "chunks of odd sizes": {"max_num_seqs": 7, "max_num_batched_tokens": 13, "enable_prefix_caching": False},
    "blocks of three": {"block_size": 3},
    SHORT_OF_MEMORY: {},
    "scheduled ahead": {"async_scheduling": True},
    "not scheduled ahead": {"async_scheduling": False},
    "no CUDA graphs": {"cuda_graphs": False},
}
"""Options of `make_engine`, by name of the mix."""

SAMPLING: dict[str, tuple[dict[str, Any], ...]] = {
    "random sampling": ({"temperature": 1.0}, {"temperature": 1.5, "top_k": 50, "top_p": 0.9}),
    "penalties": ({"temperature": 0.8, "min_p": 0.05, "repetition_penalty": 1.3, "presence_penalty": 1.0},),
}
"""Sampling parameters that sequences use in turn. Plain random sampling is done within CUDA graphs."""


@dataclass(frozen=True)
class Model:
    path: Path
    decoder: Decoder
    hf_model: PreTrainedModel

    @classmethod
    def make(cls, folder: Path, architecture: str, plan: Plan) -> "Model":
        path = make_tiny_model(
            folder / architecture,
            architecture,
            seed=SEEDS[architecture],
            num_layers=plan.num_tiny_layers,
            sliding_window=WINDOW if architecture == "mistral" else None,
        )
        device = torch.device(plan.device)
        decoder = load_model(path, dtype=torch.float32, device=device, kernels=triton_kernels())
        hf_model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, trust_remote_code=False)
        return cls(path, decoder, hf_model.to(device))

    def expected(self, prompt: list[int], num_tokens: int) -> list[int]:
        input_ids = torch.tensor([prompt], device=self.hf_model.device)
        output = self.hf_model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        return output[0, len(prompt) :].tolist()

    @torch.no_grad()
    def margins(self, prompt: list[int], tokens: list[int]) -> list[float]:
        """The lead of the likeliest token over the second at each of `tokens`."""
        token_ids = torch.tensor([prompt + tokens], device=self.hf_model.device)
        logits = self.hf_model(token_ids).logits[0, len(prompt) - 1 : -1]
        best, second = logits.topk(2).values.unbind(dim=1)
        return (best - second).tolist()


def run(plan: Plan, cells: Cells) -> None:
    prompts = make_prompts(plan)
    with tempfile.TemporaryDirectory() as folder:
        for architecture in plan.architectures:
            settings = {"architecture": architecture}
            model = Model.make(Path(folder), architecture, plan)
            expected = [model.expected(prompt, plan.num_new_tokens) for prompt in prompts]
            for name, mix in MIXES.items():
                cells.run(name, settings, _check_mix, model, prompts, expected, plan, name, mix)
            cells.run("resumption", settings, _check_resumption, model, prompts, expected, plan)
            for name, kinds in SAMPLING.items():
                cells.run(name, settings, _compare_sampling, model, prompts, plan, kinds)


def make_prompts(plan: Plan) -> list[list[int]]:
    rng = random.Random(7)

    def some(length: int) -> list[int]:
        return [rng.randrange(VOCAB_SIZE) for _ in range(length)]

    shared = some(plan.shared_prefix)
    return [
        shared + some(length - len(shared)) if length > len(shared) else some(length)
        for length in plan.prompt_lengths
    ]


def make_engine(
    model: Model, plan: Plan, *, num_blocks: int | None = None, cuda_graphs: bool = True, **options: Any
) -> Engine:
    """Make an engine. options: fields of `EngineConfig`."""
    model.decoder.kernels.attention.can_be_captured = cuda_graphs
    options = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "block_size": plan.small_blocks} | options
    longest = max(plan.prompt_lengths) + plan.num_new_tokens
    if num_blocks is None:
        num_blocks = len(plan.prompt_lengths) * -(-longest // options["block_size"])
    options["kv_cache_bytes"] = num_blocks * model.decoder.bytes_per_block(options["block_size"])
    config = EngineConfig(
        str(model.path), dtype="float32", device=plan.device, max_model_len=longest, **options
    )
    return Engine(config, model=model.decoder)


def finish(engine: Engine) -> dict[str, list[int]]:
    """Step to the end. Returns the tokens by sequence."""
    tokens: dict[str, list[int]] = {}
    while engine.has_unfinished:
        for output in engine.step():
            tokens.setdefault(output.seq_id, []).extend(output.token_ids)
        engine.check_integrity()
    return tokens


def greedy(num_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=num_tokens)


def _check_mix(
    model: Model,
    prompts: Sequence[list[int]],
    expected: Sequence[list[int]],
    plan: Plan,
    name: str,
    mix: dict[str, Any],
) -> Figures:
    if name == SHORT_OF_MEMORY:
        longest = max(plan.prompt_lengths) + plan.num_new_tokens
        mix = {"num_blocks": -(-longest // plan.small_blocks) + 1}
    engine = make_engine(model, plan, **mix)
    for index, prompt in enumerate(prompts):
        engine.add(EngineRequest(str(index), prompt, greedy(plan.num_new_tokens)))
    found = finish(engine)
    stats = engine.stats()
    figures = {
        "num_preemptions": stats.num_preemptions,
        "prefix_cache_hit_tokens": stats.prefix_cache_hit_tokens,
        **_compare(model, prompts, expected, [found[str(index)] for index in range(len(prompts))]),
    }
    # A mix without the event that it shall cause would prove nothing.
    if name == SHORT_OF_MEMORY:
        figures["ok"] &= stats.num_preemptions > 0
    elif name == SHARED:
        figures["ok"] &= stats.prefix_cache_hit_tokens > 0
    return figures


def _check_resumption(
    model: Model, prompts: Sequence[list[int]], expected: Sequence[list[int]], plan: Plan
) -> Figures:
    """Resume every sequence from another position, in one batch."""
    engine = make_engine(model, plan, enable_prefix_caching=False)
    begun = [tokens[: 1 + index % len(tokens)] for index, tokens in enumerate(expected)]
    for index, (prompt, tokens) in enumerate(zip(prompts, begun, strict=True)):
        engine.add(EngineRequest(str(index), prompt, greedy(plan.num_new_tokens), output_token_ids=tokens))
    rest = finish(engine)
    found = [tokens + rest[str(index)] for index, tokens in enumerate(begun)]
    return _compare(model, prompts, expected, found)


def _compare(
    model: Model,
    prompts: Sequence[list[int]],
    expected: Sequence[list[int]],
    found: Sequence[list[int]],
) -> Figures:
    """Compare tokens. The figures have the place of the first difference, and the margin there."""
    for index, (prompt, right, ours) in enumerate(zip(prompts, expected, found, strict=True)):
        if ours == right:
            continue
        pairs = zip(right, ours, strict=False)
        position = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(right), len(ours)))
        margin = model.margins(prompt, right)[min(position, len(right) - 1)]
        return {"ok": False, "sequence": index, "position": position, "margin": margin}
    return {"num_tokens": sum(map(len, found)), "ok": True}


def _compare_sampling(
    model: Model, prompts: Sequence[list[int]], plan: Plan, kinds: Sequence[dict[str, Any]]
) -> Figures:
    """Check sampling against the same engine without CUDA graphs.

    The figures also have the share of sequences with the tokens of the reference on the CPU, which may
    differ: its logits differ in their last bits, so a draw may fall on the other side of an edge.
    """
    cpu = torch.device("cpu")
    reference = load_model(model.path, dtype=torch.float32, device=cpu, kernels=REFERENCE)
    on_cpu = Engine(
        EngineConfig(str(model.path), dtype="float32", device="cpu", kv_cache_bytes=1 << 24), model=reference
    )

    def generate(engine: Engine) -> dict[str, list[int]]:
        for index, prompt in enumerate(prompts):
            kind = kinds[index % len(kinds)]
            params = SamplingParams(**kind, seed=index, max_tokens=plan.num_new_tokens)
            engine.add(EngineRequest(str(index), prompt, params))
        return finish(engine)

    found = generate(make_engine(model, plan))
    without_graphs = generate(make_engine(model, plan, cuda_graphs=False))
    same = sum(found[seq_id] == tokens for seq_id, tokens in generate(on_cpu).items())
    return {"same_as_on_the_cpu": same / len(prompts), "ok": found == without_graphs}
