"""Penalties and `min_tokens` where the last token is on the device only: as if the host knew it already."""

import pytest
import torch

from ingine.engine.sample.processors import process
from ingine.engine.schedule.sequence import Sequence
from tests.engine.sampling_cases import EOS, make_logits, make_sequence

VOCAB_SIZE = 40
PENALTIES = {"repetition_penalty": 1.7, "presence_penalty": 0.5, "frequency_penalty": 0.9}


def one_behind(output: list[int], **params) -> Sequence:
    """Process without the last token of `output`, but with a pending token."""
    seq = make_sequence(output[:-1], **params)
    seq.num_pending_tokens = 1
    return seq


def test_a_pending_token_is_penalised_as_one_that_is_known():
    logits = make_logits(7, vocab_size=VOCAB_SIZE)
    # The prompt is 1, 2, 3. A token that is new, of the prompt, of the output, of both; first and last id.
    outputs = [[5, 6], [5, 2], [5, 5], [2, 2], [9, 0], [9, VOCAB_SIZE - 1], [8, 9]]
    known = process(logits.clone(), [make_sequence(output, **PENALTIES) for output in outputs])
    seqs = [one_behind(output, **PENALTIES) for output in outputs]
    got = process(logits.clone(), seqs, torch.tensor([output[-1] for output in outputs]))
    assert torch.equal(got, known)


def test_rows_with_and_without_a_pending_token_do_not_mix():
    logits = make_logits(5, vocab_size=VOCAB_SIZE)
    bias = {"logit_bias": {4: 3.0}}
    outputs = [[5, 5], [7], [0], [5, 2], [5]]
    params = [PENALTIES, PENALTIES | bias, {}, {"repetition_penalty": 2.0}, bias]
    known = [make_sequence(output, **p) for output, p in zip(outputs, params, strict=True)]
    is_ahead = [True, False, True, True, False]
    seqs = [
        one_behind(output, **p) if ahead else make_sequence(output, **p)
        for output, p, ahead in zip(outputs, params, is_ahead, strict=True)
    ]
    pending = torch.tensor([5, -1, 0, 2, -1])
    assert torch.equal(process(logits.clone(), seqs, pending), process(logits.clone(), known))


def test_a_row_that_broke_touches_no_other():
    """Its pending token is -1, as nothing could be chosen. It ends; the rows before and after it go on."""
    logits = make_logits(3, vocab_size=VOCAB_SIZE)
    seqs = [one_behind([5, 6], **PENALTIES) for _ in range(3)]
    got = process(logits.clone(), seqs, torch.tensor([6, -1, 6]))
    alone = [process(logits[row : row + 1].clone(), seqs[:1], torch.tensor([6])) for row in (0, 2)]
    assert torch.equal(got[::2], torch.cat(alone))
    assert process(logits.clone(), seqs, torch.full((3,), -1)).isfinite().all()


@pytest.mark.parametrize("num_output_tokens", [1, 2, 3])
def test_min_tokens_counts_a_pending_token(num_output_tokens):
    """If min_tokens is 3, the fourth token is the first that may end the sequence."""
    seq = one_behind([0] * num_output_tokens, min_tokens=3)
    is_masked = num_output_tokens < 3
    [row] = process(torch.zeros(1, VOCAB_SIZE), [seq], torch.tensor([0]))
    assert (row[EOS] == -torch.inf) == is_masked
    assert (row == -torch.inf).sum() == is_masked


def test_logits_that_nothing_changes_are_returned_as_they_are():
    logits = make_logits(1, vocab_size=VOCAB_SIZE).bfloat16()
    assert process(logits, [one_behind([1, 2])], torch.tensor([2])) is logits
