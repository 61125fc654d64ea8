"""Token for token what transformers generates, however the scheduler cuts and mixes the work."""

import random

import pytest

from ingine.engine.request import EngineRequest
from tests.engine.driving import Driver, greedy, make_engine

MAX_TOKENS = 24
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
MIXES = {
    "one at a time": {"max_num_seqs": 1, "max_num_batched_tokens": 256},
    "whole prompts, all at once": {"max_num_seqs": 8, "max_num_batched_tokens": 512},
    "one token a step": {"max_num_seqs": 1, "max_num_batched_tokens": 1},
    "chunks of odd sizes": {"max_num_seqs": 7, "max_num_batched_tokens": 13},
    "no prefix cache": {"enable_prefix_caching": False},
    "blocks of one token": {"block_size": 1},
    "one block a sequence": {"block_size": 160},
    "memory for one and a half": {"num_blocks": 24, "max_num_seqs": 8},
}


def make_prompts() -> list[list[int]]:
    """Make prompts of all lengths; three share 40 tokens, and two are equal."""
    rng = random.Random(7)
    some = [[rng.randrange(256) for _ in range(length)] for length in (1, 4, 33)]
    shared = [rng.randrange(256) for _ in range(40)]
    return [*some, [*shared, 1, 2, 3], shared, [*shared, 9], shared]


def random_mix(rng: random.Random) -> dict:
    """Options of `make_engine` that cut and mix the work in some way or other."""
    max_num_seqs, block_size = rng.randint(1, 8), rng.choice([1, 3, 4, 16])
    return {
        "block_size": block_size,
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": rng.randint(max_num_seqs, 64),
        "enable_prefix_caching": rng.random() < 0.7,
        "num_blocks": rng.choice([None, 100 // block_size + 1]),
    }


PROMPTS = make_prompts()


@pytest.mark.parametrize("is_async", [False, True], ids=["a step at a time", "a step ahead"])
@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES.keys())
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_mix_gives_the_tokens_of_transformers(tiny, arch, mix, is_async):
    model = tiny(arch)
    driver = Driver(make_engine(model, async_scheduling=is_async, **mix))
    for index, prompt in enumerate(PROMPTS):  # they come while others run
        driver.engine.add(EngineRequest(str(index), prompt, greedy(MAX_TOKENS)))
        driver.step()
    results = driver.finish()
    assert [results[str(i)].token_ids for i in range(len(PROMPTS))] == [
        model.hf_greedy(prompt, MAX_TOKENS) for prompt in PROMPTS
    ]


def test_the_tight_mix_preempts_and_shared_prefixes_hit(llama):
    driver = Driver(make_engine(llama, **MIXES["memory for one and a half"]))
    for index, prompt in enumerate(PROMPTS):
        driver.engine.add(EngineRequest(str(index), prompt, greedy(MAX_TOKENS)))
    driver.finish()
    assert driver.engine.stats().num_preemptions > 0

    driver = Driver(make_engine(llama))
    for index, prompt in enumerate(PROMPTS):
        driver.engine.add(EngineRequest(str(index), prompt, greedy(MAX_TOKENS)))
    results = driver.finish()
    assert results["6"].num_cached_tokens == 36  # ten blocks of four, less the one that has the last token
    assert driver.engine.stats().prefix_cache_hit_tokens >= 36


@pytest.mark.parametrize("seed", range(16))
def test_random_mixes_with_aborts_and_resumptions(tiny, seed):
    """A sequence may be aborted, or its engine lost, at any time. It is resumed with the tokens it had."""
    rng = random.Random(seed)
    model = tiny(ARCHITECTURES[seed % len(ARCHITECTURES)])

    def new_driver() -> Driver:
        return Driver(make_engine(model, async_scheduling=rng.random() < 0.5, **random_mix(rng)))

    driver = new_driver()
    waiting, running = list(range(len(PROMPTS))), []
    output: list[list[int]] = [[] for _ in PROMPTS]
    while waiting or running:
        event = rng.random()
        if waiting and event < 0.5:
            index = waiting.pop(rng.randrange(len(waiting)))
            driver.engine.add(
                EngineRequest(
                    str(index),
                    PROMPTS[index],
                    greedy(MAX_TOKENS),
                    priority=rng.randint(0, 2),
                    output_token_ids=output[index],
                )
            )
            running.append(index)
        elif running and event < 0.6:
            index = running.pop(rng.randrange(len(running)))
            driver.engine.abort(str(index))
            waiting.append(index)
        elif event < 0.62:
            driver = new_driver()
            waiting, running = waiting + running, []
        for step_output in driver.step():
            index = int(step_output.seq_id)
            output[index] += step_output.token_ids
            if step_output.finish_reason:
                running.remove(index)
    assert output == [model.hf_greedy(prompt, MAX_TOKENS) for prompt in PROMPTS]


SMOLLM2_CHATS = (
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Count from one to twenty, in words.",
)


def test_the_real_model_says_what_it_says_in_transformers(smollm2):
    prompts = [smollm2.tokenizer.encode_chat([{"role": "user", "content": chat}]) for chat in SMOLLM2_CHATS]
    driver = Driver(make_engine(smollm2, block_size=16, max_num_batched_tokens=24))
    for index, prompt in enumerate(prompts):
        driver.engine.add(EngineRequest(str(index), prompt, greedy(MAX_TOKENS)))
        driver.step()
    results = driver.finish()
    for index, prompt in enumerate(prompts):
        expected = smollm2.hf_greedy(prompt, MAX_TOKENS)
        assert results[str(index)].token_ids == expected
        assert results[str(index)].text == smollm2.tokenizer.decode(expected)
