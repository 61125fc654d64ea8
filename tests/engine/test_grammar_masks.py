"""Masks of many rows at a time are those of each alone, and what they do to logits is the definition's."""

import random

import numpy as np
import pytest
import torch

from ingine.engine.grammar.masks import ConstrainedRows, MaskFiller
from ingine.engine.kernels import native
from ingine.engine.kernels.native import sampling as native_sampling
from ingine.engine.kernels.sampling.cuda import TRITON_SAMPLING
from ingine.engine.kernels.sampling.masks import mask
from tests.engine.builds import library
from tests.engine.grammars import mask_of, smollm2_compiler, state_of, walk
from tests.engine.marks import EVERY_MARCH, needs_interpreter

NUM_WORDS = 49_152 // 32


@pytest.fixture(scope="module")
def filler():
    filler = MaskFiller()
    yield filler
    filler.close()


def states(n: int) -> list:
    schema = {"type": "object", "properties": {"key": {"type": "integer"}, "b": {"type": "string"}}}
    made = []
    for seed in range(n):
        asked = {"json": schema} if seed % 2 else {"regex": "[a-z]+-[0-9]{3}"}
        state = state_of(smollm2_compiler(), **asked)
        walk(state, NUM_WORDS, random.Random(seed), max_tokens=seed)
        made.append(state)
    return [state for state in made if not state.is_terminated]


def test_many_rows_are_as_each_alone(filler):
    constrained = [ConstrainedRows(2 * row, state) for row, state in enumerate(states(12))]
    filled = filler.start(constrained).result()
    assert filled.rows.tolist() == [one.first for one in constrained]
    for one, row in zip(constrained, filled.masks, strict=True):
        np.testing.assert_array_equal(row, mask_of(one.state, NUM_WORDS))


def test_each_token_of_a_draft_has_the_mask_that_it_leads_to(filler):
    [state] = states(1)
    draft = walk(state.ahead(), NUM_WORDS, random.Random(3), max_tokens=4)
    other = state_of(smollm2_compiler(), regex="abc")
    filled = filler.fill([ConstrainedRows(5, state, draft), ConstrainedRows(11, other)])
    assert filled.rows.tolist() == [5, 6, 7, 8, 9, 11]
    for index in range(5):
        expected = state.ahead()
        assert expected.accept(draft[:index])
        np.testing.assert_array_equal(filled.masks[index], mask_of(expected, NUM_WORDS))
    assert state.num_tokens == 0
    np.testing.assert_array_equal(filled.masks[5], mask_of(other, NUM_WORDS))


def test_after_a_draft_that_the_grammar_forbids_there_is_no_token(filler):
    compiler = smollm2_compiler()
    [a], [x] = (compiler.vocabulary.ll_tokenizer.greedy_tokenize(text) for text in "ax")
    failed, fine = (state_of(compiler, regex="a[bc]d") for _ in range(2))
    assert not failed.accept([x])
    filled = filler.fill([ConstrainedRows(0, fine, [a, x, a]), ConstrainedRows(4, failed)])
    assert [row.any() for row in filled.masks] == [True, True, False, False, False]
    assert fine.error is None


def masked(apply, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that `apply` has masked, and those of the definition. Of 6 rows 3 are masked."""
    rng = np.random.default_rng(0)
    logits = torch.randn(6, 1000, generator=torch.Generator().manual_seed(1)).to(dtype)
    masks = rng.integers(-(2**31), 2**31, (3, 32), dtype=np.int32)
    masks[0, 3:20], masks[1, 5:] = 0, -1
    rows = np.array([5, 0, 2])
    expected = logits.clone()
    for row, words in zip(rows, masks, strict=True):
        for token_id in range(1000):
            if not words[token_id // 32] >> (token_id % 32) & 1:
                expected[row, token_id] = -torch.inf
    apply(logits, rows, masks)
    return logits, expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_definition_forbids_what_has_no_bit(dtype):
    ours, expected = masked(mask, dtype)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("march", EVERY_MARCH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_native_kernel_does_what_is_defined(dtype, march, monkeypatch):
    monkeypatch.setattr(native, "library", lambda: library(march))
    native_sampling._library.cache_clear()
    ours, expected = masked(native_sampling.mask, dtype)
    native_sampling._library.cache_clear()
    assert torch.equal(ours, expected)


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_kernel_for_gpus_does_what_is_defined(dtype):
    ours, expected = masked(TRITON_SAMPLING.mask, dtype)
    assert torch.equal(ours, expected)
