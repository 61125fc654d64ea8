"""Paged KV memory: assigns blocks to sequences, and finds the blocks of prefixes that they can share."""

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable
from hashlib import blake2b

from ingine.engine.schedule.sequence import Sequence
from ingine.errors import EngineError


class BlockManager:
    """Counts the sequences that use each block, in `ref_counts`; a block with none is free.

    A full block whose KV is computed is cached under a hash of all tokens up to its end, so that equal
    hashes mean equal prefixes. A free block keeps its hash until the block is allocated again: free blocks
    without a hash are allocated first, then the least recently used.

    Without prefix caching only the choices of one request share blocks: their hashes begin with the group's
    salt.
    """

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool = True):
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.ref_counts = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._block_of_hash: dict[bytes, int] = {}
        self._hash_of_block: dict[int, bytes] = {}

    @property
    def num_free_blocks(self) -> int:
        return len(self._free)

    def num_missing_blocks(self, seq: Sequence, num_tokens: int) -> int:
        """The number of blocks that `seq` needs besides its own to hold the KV of `num_tokens` tokens."""
        return max(0, -(-num_tokens // self.block_size) - len(seq.block_table))

    def find_prefix(self, seq: Sequence) -> list[int]:
        """Return the cached blocks of the longest known prefix.

        At least one token is left to compute, since its logits are needed.
        """
        if not self._is_shared(seq):
            return []
        blocks = []
        for index in range((seq.num_tokens - 1) // self.block_size):
            block = self._block_of_hash.get(self._hash(seq, index))
            if block is None:
                break
            blocks.append(block)
        return blocks

    def num_free_in(self, blocks: list[int]) -> int:
        """Count the free blocks among these cached ones. Once shared, such a block is no longer free."""
        return sum(self.ref_counts[block] == 0 for block in blocks)

    def share_prefix(self, seq: Sequence, blocks: list[int]) -> None:
        """Put blocks from `find_prefix` into `seq`'s empty table, and count their tokens as computed."""
        for block in blocks:
            if self.ref_counts[block] == 0:
                del self._free[block]
            self.ref_counts[block] += 1
        seq.block_table = array("i", blocks)
        seq.num_hashed_blocks = len(blocks)
        seq.num_computed_tokens = len(blocks) * self.block_size

    def allocate(self, seq: Sequence, num_tokens: int) -> bool:
        """Grow `seq`'s block table to hold `num_tokens` tokens. Returns False, and changes nothing, if too
        few blocks are free.
        """
        num_missing = self.num_missing_blocks(seq, num_tokens)
        if num_missing > len(self._free):
            return False
        for _ in range(num_missing):
            block, _ = self._free.popitem(last=False)
            self._forget(block)
            self.ref_counts[block] = 1
            seq.block_table.append(block)
        return True

    def cache_full_blocks(self, seq: Sequence, num_tokens: int) -> None:
        """Cache the full blocks among those of the first `num_tokens` tokens of `seq`, all computed."""
        if not self._is_shared(seq):
            return
        for index in range(seq.num_hashed_blocks, num_tokens // self.block_size):
            block, digest = seq.block_table[index], self._hash(seq, index)
            # Two sequences may compute one prefix at the same time: the block that is complete first is
            # shared.
            if digest not in self._block_of_hash:
                self._block_of_hash[digest] = block
                self._hash_of_block[block] = digest
            seq.num_hashed_blocks = index + 1

    def uncache(self, seq: Sequence) -> None:
        """Remove the blocks of `seq` from the prefix cache, because their KV is wrong."""
        for block in seq.block_table:
            self._forget(block)

    def free(self, seq: Sequence) -> None:
        """Free all blocks of `seq`, the last first: a cached block is useless without those before it."""
        for block in reversed(seq.block_table):
            self.ref_counts[block] -= 1
            if self.ref_counts[block] == 0:
                self._free[block] = None
                if block not in self._hash_of_block:
                    self._free.move_to_end(block, last=False)
        seq.block_table = array("i")
        seq.num_hashed_blocks = 0
        seq.num_computed_tokens = 0

    def check_integrity(self, seqs: Iterable[Sequence]) -> None:
        """Raise EngineError unless every block is accounted for. `seqs` are all sequences with blocks."""
        seqs = list(seqs)
        uses = Counter(block for seq in seqs for block in seq.block_table)
        for block in range(self.num_blocks):
            if self.ref_counts[block] != uses[block]:
                raise EngineError(
                    f"block {block} is in {uses[block]} tables, but its count is {self.ref_counts[block]}"
                )
            if (block in self._free) == bool(uses[block]):
                raise EngineError(f"block {block} is in {uses[block]} tables, free: {block in self._free}")
        if {block: digest for digest, block in self._block_of_hash.items()} != self._hash_of_block:
            raise EngineError("the hash table and the blocks' hashes disagree")
        for seq in seqs:
            if len(set(seq.block_table)) != len(seq.block_table):
                raise EngineError(f"sequence {seq.seq_id} has a block twice: {list(seq.block_table)}")
            if self.num_missing_blocks(seq, seq.num_computed_tokens):
                raise EngineError(f"sequence {seq.seq_id} has more tokens computed than its blocks hold")

    def _is_shared(self, seq: Sequence) -> bool:
        return self.enable_prefix_caching or seq.group is not None

    def _forget(self, block: int) -> None:
        if (digest := self._hash_of_block.pop(block, None)) is not None:
            del self._block_of_hash[digest]

    def _hash(self, seq: Sequence, index: int) -> bytes:
        """The chained hash of `seq`'s full block `index`. It is computed once, since tokens never change."""
        hashes = seq.block_hashes
        while len(hashes) <= index:
            start = len(hashes) * self.block_size
            before = b"" if self.enable_prefix_caching or seq.group is None else seq.group.salt
            digest = blake2b(hashes[-1] if hashes else before, digest_size=16)
            digest.update(array("q", seq.token_ids[start : start + self.block_size]))
            hashes.append(digest.digest())
        return hashes[index]
