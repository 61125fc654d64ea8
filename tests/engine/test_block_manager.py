"""Paged KV memory: who has which block, and which prefix is found again."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from ingine.engine.request import EngineRequest
from ingine.engine.schedule.block_manager import BlockManager
from ingine.engine.schedule.sequence import Sequence
from ingine.errors import EngineError
from ingine.sampling_params import SamplingParams


def make_sequence(token_ids: list[int], seq_id: str = "seq") -> Sequence:
    request = EngineRequest(seq_id, token_ids, SamplingParams())
    return Sequence(request, seed=0, sort_key=(0, 0), max_num_tokens=10_000)


def compute(blocks: BlockManager, seq: Sequence, num_tokens: int | None = None) -> None:
    """Do what the engine does in a step, without the model."""
    num_tokens = seq.num_tokens if num_tokens is None else num_tokens
    assert blocks.allocate(seq, num_tokens)
    seq.num_computed_tokens = num_tokens
    blocks.cache_full_blocks(seq, seq.num_computed_tokens)


def admit(blocks: BlockManager, seq: Sequence) -> int:
    """Share what is cached, compute the rest. Returns how many tokens were cached."""
    blocks.share_prefix(seq, blocks.find_prefix(seq))
    num_cached = seq.num_computed_tokens
    compute(blocks, seq)
    return num_cached


def test_a_sequence_gets_as_many_blocks_as_its_tokens_need():
    blocks = BlockManager(num_blocks=4, block_size=4)
    seq = make_sequence(list(range(9)))
    assert blocks.num_missing_blocks(seq, 9) == 3
    assert blocks.allocate(seq, 9)
    assert len(seq.block_table) == 3 and blocks.num_free_blocks == 1
    assert blocks.allocate(seq, 12) and len(seq.block_table) == 3, "there is room in the last one"


def test_too_few_free_blocks_change_nothing():
    blocks = BlockManager(num_blocks=2, block_size=4)
    seq = make_sequence(list(range(9)))
    assert not blocks.allocate(seq, 9)
    assert not seq.block_table and blocks.num_free_blocks == 2


def test_a_prefix_is_shared_while_its_owner_runs_and_found_after():
    blocks = BlockManager(num_blocks=16, block_size=4)
    first, second = make_sequence([*range(12), 50]), make_sequence([*range(12), 60])
    assert admit(blocks, first) == 0
    assert admit(blocks, second) == 12
    assert first.block_table[:3] == second.block_table[:3]
    assert blocks.num_free_blocks == 16 - 5
    blocks.free(first)
    blocks.free(second)
    assert blocks.num_free_blocks == 16
    assert admit(blocks, make_sequence([*range(8), 70])) == 8


def test_one_token_is_always_left_to_compute():
    blocks = BlockManager(num_blocks=16, block_size=4)
    admit(blocks, make_sequence(list(range(8))))
    assert admit(blocks, make_sequence(list(range(8)))) == 4


def test_equal_blocks_after_different_prefixes_are_different():
    blocks = BlockManager(num_blocks=16, block_size=2)
    admit(blocks, make_sequence([1, 2, 3, 4, 0]))
    assert admit(blocks, make_sequence([9, 9, 3, 4, 0])) == 0


def test_a_block_is_not_found_before_it_is_full_and_computed():
    blocks = BlockManager(num_blocks=16, block_size=4)
    seq = make_sequence(list(range(9)))
    compute(blocks, seq, 3)
    assert blocks.find_prefix(make_sequence(list(range(9)))) == []
    assert blocks.allocate(seq, 8)
    assert blocks.find_prefix(make_sequence(list(range(9)))) == []
    compute(blocks, seq, 8)
    assert len(blocks.find_prefix(make_sequence(list(range(9))))) == 2


def test_output_blocks_are_cached_too():
    blocks = BlockManager(num_blocks=16, block_size=4)
    seq = make_sequence(list(range(4)))
    compute(blocks, seq)
    for token_id in range(4, 9):
        seq.append(token_id)
        compute(blocks, seq)
    blocks.free(seq)
    assert admit(blocks, make_sequence(list(range(10)))) == 8


def test_the_least_recently_used_prefix_goes_first_and_its_end_before_its_beginning():
    blocks = BlockManager(num_blocks=4, block_size=2)
    older, newer = make_sequence([1, 2, 3, 4]), make_sequence([5, 6, 7, 8])
    admit(blocks, older)
    admit(blocks, newer)
    blocks.free(older)
    blocks.free(newer)
    compute(blocks, make_sequence([9]))
    assert len(blocks.find_prefix(make_sequence([1, 2, 3, 4, 0]))) == 1, "its second block is gone"
    assert len(blocks.find_prefix(make_sequence([5, 6, 7, 8, 0]))) == 2


def test_blocks_with_nothing_in_them_are_taken_before_cached_ones():
    blocks = BlockManager(num_blocks=4, block_size=2)
    seq = make_sequence([1, 2, 3])  # a full block and a half
    admit(blocks, seq)
    blocks.free(seq)
    compute(blocks, make_sequence([9] * 6))  # three blocks
    assert len(blocks.find_prefix(make_sequence([1, 2, 3]))) == 1


def test_without_prefix_caching_nothing_is_found():
    blocks = BlockManager(num_blocks=16, block_size=4, enable_prefix_caching=False)
    admit(blocks, make_sequence(list(range(9))))
    assert admit(blocks, make_sequence(list(range(9)))) == 0


def test_check_integrity_names_what_is_wrong():
    blocks = BlockManager(num_blocks=4, block_size=4)
    seq = make_sequence(list(range(9)))
    compute(blocks, seq)
    blocks.check_integrity([seq])
    with pytest.raises(EngineError, match="in 0 tables, but its count is 1"):
        blocks.check_integrity([])
    seq.block_table.pop()
    with pytest.raises(EngineError, match="block 2 is in 0 tables"):
        blocks.check_integrity([seq])


class AnyUse(RuleBasedStateMachine):
    """Any order of admitting, decoding and freeing, in memory that is always short."""

    def __init__(self):
        super().__init__()
        self.blocks = BlockManager(num_blocks=8, block_size=2)
        self.seqs: list[Sequence] = []

    @rule(token_ids=st.lists(st.integers(0, 1), min_size=1, max_size=8))
    def admit(self, token_ids):
        seq = make_sequence(token_ids, str(len(self.seqs)))
        prefix = self.blocks.find_prefix(seq)
        assert len(prefix) * 2 < seq.num_tokens
        self.blocks.share_prefix(seq, prefix)
        if self.blocks.allocate(seq, seq.num_tokens):
            compute(self.blocks, seq)
            self.seqs.append(seq)
        else:
            self.blocks.free(seq)

    @precondition(lambda self: self.seqs)
    @rule(which=st.integers(0), token_id=st.integers(0, 1))
    def decode(self, which, token_id):
        seq = self.seqs[which % len(self.seqs)]
        seq.append(token_id)
        if self.blocks.allocate(seq, seq.num_tokens):
            compute(self.blocks, seq)
        else:
            self.seqs.remove(seq)
            self.blocks.free(seq)

    @precondition(lambda self: self.seqs)
    @rule(which=st.integers(0))
    def free(self, which):
        self.blocks.free(self.seqs.pop(which % len(self.seqs)))

    @invariant()
    def every_block_is_accounted_for(self):
        self.blocks.check_integrity(self.seqs)

    @invariant()
    def equal_blocks_hold_equal_prefixes(self):
        content: dict[int, list[int]] = {}
        for seq in self.seqs:
            for index in range(seq.num_computed_tokens // 2):
                tokens = seq.token_ids[: 2 * index + 2]
                assert content.setdefault(seq.block_table[index], tokens) == tokens


def test_any_use_keeps_the_books_right():
    run_state_machine_as_test(
        AnyUse, settings=settings(max_examples=50, stateful_step_count=30, deadline=None)
    )
