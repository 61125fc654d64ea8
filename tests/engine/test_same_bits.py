"""Native kernels give a sequence the same bits, however its computation is batched and cut.

So a worker that resumes a job after another one's death continues exactly as that one would have, with
sampling too, and not only in float32.
"""

from collections.abc import Callable

import pytest
import torch

from ingine.engine.config import EngineConfig
from ingine.engine.engine import Engine
from ingine.engine.kernels import native
from ingine.engine.request import EngineRequest
from ingine.sampling_params import SamplingParams
from tests.engine.builds import library
from tests.engine.marks import march, needs_native
from tests.tiny_models import make_tiny_model, smollm2_path

pytestmark = needs_native

SAMPLING = SamplingParams(temperature=0.8, top_p=0.95, seed=1, max_tokens=24, ignore_eos=True, logprobs=1)
RESUMED_AT = 10

Result = list[tuple[int, float]]
"""Token ids, each with its log probability, to the last bit."""


@pytest.fixture(params=["tiny", pytest.param("smollm2", marks=pytest.mark.wide)])
def make_engine(request, tmp_path) -> Callable[..., Engine]:
    """Make an engine with options of `EngineConfig`."""
    if request.param == "smollm2":
        path = smollm2_path()
    else:
        path = make_tiny_model(tmp_path, max_position_embeddings=1024, dtype=torch.bfloat16)

    def make(**options) -> Engine:
        options = {"dtype": "bfloat16", "max_model_len": 1024, "kv_cache_bytes": 128 << 20} | options
        return Engine(EngineConfig(str(path), **options))

    return make


def generate(engine: Engine, prompts: list[list[int]], so_far: list[list[int]] | None = None) -> list[Result]:
    """All at once; `so_far` is what each has from an earlier life."""
    results: list[Result] = [[] for _ in prompts]
    for index, prompt in enumerate(prompts):
        engine.add(
            EngineRequest(str(index), prompt, SAMPLING, output_token_ids=so_far[index] if so_far else [])
        )
    while engine.has_unfinished:
        for output in engine.step():
            results[int(output.seq_id)] += [
                (one["token_id"], one["logprob"]) for one in output.logprobs or []
            ]
    return results


@pytest.mark.parametrize("build", [march("native"), march("x86-64-v3", wide=True)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": "float32"},
        {"quantization": "int8", "kv_cache_dtype": "int8"},
        {"quantization": "int4"},
        {"kv_cache_dtype": "int4"},
    ],
    ids=["bfloat16", "float32", "int8", "int4", "int4 KV"],
)
def test_batches_chunks_prefix_hits_drafts_preemption_and_resumption_change_no_bit(
    make_engine, monkeypatch, options, build
):
    monkeypatch.setattr(native, "library", lambda: library(build))
    engine = make_engine(enable_prefix_caching=False, **options)
    text = engine.tokenizer.encode(
        "The tide goes out, and the boats lie on their sides until it comes back. " * 40
    )
    prompts = [text[:5], text[3:44], text[1:560]]  # the last is longer than attention's pieces of KV
    alone = [generate(engine, [prompt])[0] for prompt in prompts]

    assert generate(engine, prompts) == alone

    small_steps = make_engine(max_num_batched_tokens=37, max_num_seqs=8, **options)
    assert generate(small_steps, prompts) == alone
    assert generate(small_steps, prompts) == alone
    assert small_steps.stats().prefix_cache_hit_tokens > 500

    drafting = make_engine(enable_prefix_caching=False, speculation="ngram", **options)
    drafting._scheduler._speculator.draft = lambda seqs, _: [[text[5], text[6]] for _ in seqs]
    assert generate(drafting, prompts) == alone
    assert drafting.stats().num_draft_tokens > 0

    block_bytes = engine.config.kv_cache_bytes // engine.stats().num_blocks
    memory = {"max_model_len": 128, "kv_cache_bytes": 11 * block_bytes}
    tight = make_engine(enable_prefix_caching=False, **options, **memory)
    assert generate(tight, 3 * [prompts[1]]) == 3 * [alone[1]]
    assert tight.stats().num_preemptions > 0

    so_far = [[token_id for token_id, _ in result[:RESUMED_AT]] for result in alone]
    assert generate(engine, prompts, so_far) == [result[RESUMED_AT:] for result in alone]
