"""The kernel of `ingine.engine.kernels.sampling.cuda`: chooses one token for each row, in one launch.

`ingine.engine.kernels.sampling.reference` is the definition. The kernel finds the token as a logit and a
number n: the nth token, by id, of those that have this logit. So only the last pass depends on the order of
tokens with equal logits.
"""

import triton
import triton.language as tl

BELOW_ONE = tl.constexpr(1 - 2**-24)
"""The largest float32 under 1. A normal number times this is the next smaller number."""


@triton.jit
def choose_kernel(
    logits_ptr,
    candidates_ptr,
    rows_ptr,
    token_ids_ptr,
    row_stride,
    vocab_size,
    num_candidates,
    CANDIDATES_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    NUM_DIGITS: tl.constexpr,
):
    """Program (row) writes token_ids[row] int64: the token that rows[row] (see `pack_params`) chooses from
    logits[row, :vocab_size]; -1 where the largest logit is not finite.

    candidates[row, :num_candidates] are the row's largest logits, descending, with NaN as the largest of all.
    If they include all tokens that may be drawn, the row is read once or twice more; else NUM_DIGITS + 1
    times for each cut and for the draw.
    """
    row = tl.program_id(0).to(tl.int64)
    logits = logits_ptr + row * row_stride
    candidates = candidates_ptr + row * num_candidates
    temperature = tl.load(rows_ptr + row * 5)
    top_k = tl.load(rows_ptr + row * 5 + 1)
    top_p = tl.load(rows_ptr + row * 5 + 2)
    min_p = tl.load(rows_ptr + row * 5 + 3)
    uniform = tl.load(rows_ptr + row * 5 + 4)
    largest = tl.load(candidates).to(tl.float32)

    token_id = -1
    if tl.abs(largest) < float("inf"):  # false for NaN
        if temperature == 0:
            token_id = _nth_equal(logits, vocab_size, largest, 0, BLOCK)
        elif (top_k > 0) | (top_p < 1) | (min_p > 0):
            value, nth = _draw_cut(
                logits,
                candidates,
                vocab_size,
                num_candidates,
                largest,
                temperature,
                top_k,
                top_p,
                min_p,
                uniform,
                CANDIDATES_BLOCK,
                BLOCK,
                NUM_DIGITS,
            )
            token_id = _nth_equal(logits, vocab_size, value, nth, BLOCK)
        else:
            token_id = _draw_whole(logits, vocab_size, largest, temperature, uniform, BLOCK)
    tl.store(token_ids_ptr + row, token_id)


@triton.jit
def _load(logits, start, vocab_size, BLOCK: tl.constexpr):
    columns = start + tl.arange(0, BLOCK)
    return tl.load(logits + columns, mask=columns < vocab_size, other=-float("inf")).to(tl.float32)


@triton.jit
def _weights(logits, largest, temperature, min_p):
    """Return probabilities divided by that of the likeliest token; 0 for tokens that min_p drops."""
    weights = tl.exp((logits - largest) / temperature)
    return tl.where(weights >= min_p, weights, 0.0)


@triton.jit
def _first_over(cdf, weights, target, SIZE: tl.constexpr):
    """Return the first index with a weight whose `cdf` is over `target`; the last one with a weight if
    rounding leaves none.
    """
    index = tl.arange(0, SIZE)
    first = tl.min(tl.where((weights > 0) & (cdf > target), index, SIZE))
    return tl.minimum(first, tl.max(tl.where(weights > 0, index, 0)))


@triton.jit
def _nth_equal(logits, vocab_size, value, nth, BLOCK: tl.constexpr):
    """Return the id of the nth token, counted from 0, whose logit is `value`."""
    start, num_before = 0, 0
    num_equal = tl.sum((_load(logits, 0, vocab_size, BLOCK) == value).to(tl.int32))
    while (num_before + num_equal <= nth) & (start + BLOCK < vocab_size):
        start += BLOCK
        num_before += num_equal
        num_equal = tl.sum((_load(logits, start, vocab_size, BLOCK) == value).to(tl.int32))
    is_equal = (_load(logits, start, vocab_size, BLOCK) == value).to(tl.int32)
    is_nth = (is_equal > 0) & (num_before + tl.cumsum(is_equal) == nth + 1)
    return start + tl.max(tl.where(is_nth, tl.arange(0, BLOCK), 0))


@triton.jit
def _draw_whole(logits, vocab_size, largest, temperature, uniform, BLOCK: tl.constexpr):
    """Draw a token of the whole row by inverse CDF in the order of the ids."""
    total = 0.0
    last = 0  # start of the last block with a weight: no token after it is drawn, however sums are rounded
    for start in range(0, vocab_size, BLOCK):
        mass = tl.sum(_weights(_load(logits, start, vocab_size, BLOCK), largest, temperature, 0.0))
        total += mass
        last = tl.where(mass > 0, start, last)
    target = uniform * total

    start, before = 0, 0.0
    weights = _weights(_load(logits, start, vocab_size, BLOCK), largest, temperature, 0.0)
    mass = tl.sum(weights)
    while (before + mass <= target) & (start < last):
        start += BLOCK
        before += mass
        weights = _weights(_load(logits, start, vocab_size, BLOCK), largest, temperature, 0.0)
        mass = tl.sum(weights)
    return start + _first_over(before + tl.cumsum(weights), weights, target, BLOCK)


@triton.jit
def _draw_cut(
    logits,
    candidates,
    vocab_size,
    num_candidates,
    largest,
    temperature,
    top_k,
    top_p,
    min_p,
    uniform,
    CANDIDATES_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    NUM_DIGITS: tl.constexpr,
):
    """Draw by inverse CDF, in the order of the logits, from the tokens that min_p, top_k and top_p leave.
    Returns a logit, and which of the tokens with that logit was drawn.
    """
    top = _load(candidates, 0, num_candidates, CANDIDATES_BLOCK)
    rank = tl.arange(0, CANDIDATES_BLOCK)
    limit = tl.where(top_k > 0, tl.minimum(top_k, vocab_size), vocab_size)
    weights = tl.where(rank < limit, _weights(top, largest, temperature, min_p), 0.0)
    cdf = tl.cumsum(weights)

    # The candidates include all tokens that min_p and top_k leave; or all that top_p leaves of those.
    reached = tl.sum(weights)
    is_bounded = (limit <= num_candidates) | (tl.sum((weights > 0).to(tl.int32)) < num_candidates)
    mass = reached
    if not is_bounded:
        mass = _mass(logits, vocab_size, largest, temperature, min_p, BLOCK)
    is_covered = (limit >= vocab_size) & (top_p < 1) & (reached >= top_p * mass)
    if is_bounded | is_covered:
        is_left = cdf - weights < tl.where(top_p < 1, top_p * mass, float("inf"))
        weights = tl.where(is_left, weights, 0.0)
        target = uniform * tl.max(tl.where(is_left, cdf, 0.0))
        position = _first_over(cdf, weights, target, CANDIDATES_BLOCK)
        value = tl.max(tl.where(rank == position, top, -float("inf")))
        nth = position - tl.sum((top > value).to(tl.int32))
    else:
        value, nth = _draw_far(
            logits,
            vocab_size,
            largest,
            temperature,
            limit,
            top_p,
            min_p,
            uniform,
            mass,
            BLOCK,
            NUM_DIGITS,
        )
    return value, nth


@triton.jit
def _mass(logits, vocab_size, largest, temperature, min_p, BLOCK: tl.constexpr):
    """Return the sum of all weights of the row."""
    mass = 0.0
    for start in range(0, vocab_size, BLOCK):
        mass += tl.sum(_weights(_load(logits, start, vocab_size, BLOCK), largest, temperature, min_p))
    return mass


@triton.jit
def _draw_far(
    logits,
    vocab_size,
    largest,
    temperature,
    limit,
    top_p,
    min_p,
    uniform,
    mass,
    BLOCK: tl.constexpr,
    NUM_DIGITS: tl.constexpr,
):
    """Draw as `_draw_cut` does, from any number of tokens. `mass` is the sum of all that min_p leaves."""
    edge, num_at_edge = -float("inf"), vocab_size
    if limit < vocab_size:
        edge, num_at_edge, mass = _shortest_prefix(
            logits, vocab_size, largest, temperature, min_p, limit - 1, True, BLOCK, NUM_DIGITS
        )
    if top_p < 1:
        nucleus = (
            top_p * mass * BELOW_ONE
        )  # over the float32 before `top_p * mass`, so at least `top_p * mass`
        edge, num_at_edge, mass = _shortest_prefix(
            logits, vocab_size, largest, temperature, min_p, nucleus, False, BLOCK, NUM_DIGITS
        )
    value, num, _ = _shortest_prefix(
        logits, vocab_size, largest, temperature, min_p, uniform * mass, False, BLOCK, NUM_DIGITS
    )
    is_past = (value < edge) | ((value == edge) & (num > num_at_edge))  # only by rounding
    return tl.where(is_past, edge, value), tl.where(is_past, num_at_edge, num) - 1


@triton.jit
def _shortest_prefix(
    logits,
    vocab_size,
    largest,
    temperature,
    min_p,
    target,
    BY_COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
    NUM_DIGITS: tl.constexpr,
):
    """Find the shortest prefix of the tokens, in the order of their logits, with a mass over `target` or, if
    BY_COUNT, with more than `target` tokens. If there is none, it is all tokens with a weight. Returns its
    last logit, how many tokens with that logit it has, and its mass.
    """
    value = _descend(logits, vocab_size, largest, temperature, min_p, target, BY_COUNT, BLOCK, NUM_DIGITS)
    mass_over, num_over, num_equal = 0.0, 0, 0
    for start in range(0, vocab_size, BLOCK):
        x = _load(logits, start, vocab_size, BLOCK)
        weights = _weights(x, largest, temperature, min_p)
        mass_over += tl.sum(tl.where(x > value, weights, 0.0))
        num_over += tl.sum((x > value).to(tl.int32))
        num_equal += tl.sum((x == value).to(tl.int32))
    weight = tl.exp((value - largest) / temperature)
    num_needed = target - num_over if BY_COUNT else (target - mass_over) / weight
    num = tl.minimum(tl.maximum(tl.floor(num_needed).to(tl.int32) + 1, 1), num_equal)
    return value, num, mass_over + num * weight


@triton.jit
def _descend(
    logits,
    vocab_size,
    largest,
    temperature,
    min_p,
    target,
    BY_COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
    NUM_DIGITS: tl.constexpr,
):
    """Return the last logit of the prefix of `_shortest_prefix`, by a radix descent that finds four bits of
    its key in each pass.
    """
    digits = tl.arange(0, 16)
    low_bits: tl.constexpr = 32 - 4 * NUM_DIGITS
    piece: tl.constexpr = BLOCK // 8  # each logit has 16 sums: a thread has no registers for more
    key = tl.full((), 0, tl.uint32)
    before = 0.0
    for index in range(NUM_DIGITS):
        shift = 28 - 4 * index
        bins = tl.zeros((piece, 16), tl.float32)
        for start in range(0, vocab_size, piece):
            x = _load(logits, start, vocab_size, piece)
            weights = _weights(x, largest, temperature, min_p)
            if BY_COUNT:
                weights = (weights > 0).to(tl.float32)
            # The next digit of tokens that share the digits found so far; more than 15 for others.
            digit = (_key(x.to(tl.int32, bitcast=True), low_bits).to(tl.uint32, bitcast=True) ^ key) >> shift
            bins += tl.where(digit[:, None] == digits[None, :], weights[:, None], 0.0)
        masses = tl.sum(bins, axis=0)
        found = _first_over(before + tl.cumsum(masses), masses, target, 16)
        before += tl.sum(tl.where(digits < found, masses, 0.0))
        key |= found.to(tl.uint32) << shift
    return _key(key.to(tl.int32, bitcast=True), low_bits).to(tl.float32, bitcast=True)


@triton.jit
def _key(bits, LOW_BITS: tl.constexpr):
    """Convert a float's bits to its key, and back. Keys, as unsigned numbers, ascend where logits descend. 0
    comes before -0, which does not matter, since later passes compare logits. The lowest LOW_BITS are 0 in
    both.
    """
    flipped: tl.constexpr = 0x7FFFFFFF - (1 << LOW_BITS) + 1
    return tl.where(bits < 0, bits, bits ^ flipped)
