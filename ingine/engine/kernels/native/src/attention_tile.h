// Attention of a tile of rows over a segment of keys and values.
//
// A row is one query token in one query head. All rows of a tile share a KV head, so a loaded vector of keys or
// values serves all of them: the query heads of a group in decode, and also several tokens in speculation and
// prefill. Within a segment softmax is computed over all scores; segments are merged by the online softmax of
// FlashAttention (Dao et al., 2022), always from the first to the last. So a row's result depends only on its
// sequence's tokens: not on chunks, on the batch, on threads, or on whether segments were split.
#pragma once
#include <cmath>

#include "kv_int4.h"

constexpr int kSegmentStrips = 16;
constexpr int kSegmentTokens = kSegmentStrips * kStripTokens;
constexpr int kTileRows = 48;

// Vectors and rows that are multiplied at a time, with as many sums as fit into registers.
constexpr int kMaxRows = kLanes == 16 ? 6 : 4;
constexpr int kMaxColumns = kLanes == 16 ? 4 : 2;
constexpr int kStripVectors = kStripTokens / kLanes;

// A row's result so far: `max` of the scores, `sum` of the weights 2^(score - max), and the sum of the values times
// their weights, from [kOut] on. Scores are multiplied by log2(e), so that 2^x can be used.
struct RowState {
    static constexpr int kOut = 16;
    static int64_t size(int64_t head_dim) { return kOut + padded_width(head_dim); }

    float *memory;
    float &max() { return memory[0]; }
    float &sum() { return memory[1]; }
    float *out() { return memory + kOut; }

    void clear(int64_t head_dim) {
        std::memset(memory, 0, size(head_dim) * sizeof(float));
        max() = -INFINITY;
    }
};

// The weights of two partial results of a row in their sum. Every merge calls `merge`, so that all merges round in
// the same way.
struct MergeFactors {
    float max, before, added;

    MergeFactors() = default;
    MergeFactors(float max_before, float max_added) {
        max = max_before > max_added ? max_before : max_added;
        before = factor(max_before), added = factor(max_added);
    }

    floats merge(floats sum, floats new_sum) const {
        return fma(new_sum, splat(added), sum * splat(before));
    }
    float merge(float sum, float new_sum) const { return merge(splat(sum), splat(new_sum))[0]; }

  private:
    float factor(float own_max) const {
        return own_max == max ? 1 : exp2_of_negative(splat(own_max - max))[0];
    }
};

// The addresses of a segment's strips, and the tokens in each.
struct Segment {
    char *strips[kSegmentStrips];
    int32_t first_token[kSegmentStrips];
    int32_t num_tokens[kSegmentStrips];
    int num_strips;
};

template <typename Format> struct Tile {
    alignas(64) typename Format::Row queries[kTileRows * kMaxHeadDim];
    float query_scales[kTileRows], query_sums[kTileRows];
    // Each row sees tokens first_seen to last_seen.
    int32_t first_seen[kTileRows], last_seen[kTileRows];
    int num_rows;
    int64_t head_dim;
};

// sums += rows times columns, over `length` loaded vectors of each column. In a format whose vectors have several
// steps, keys use all of them (kStepsEach), each with the row's next numbers; for values column c uses one step,
// kFirstStep + c. Calls `also` with each vector's offset, to prefetch.
template <typename Format, int kFirstStep, int kStepsEach, int kRows, int kColumns, typename Also>
inline __attribute__((always_inline)) void multiply(typename Format::Sum (&sums)[kRows][kColumns],
                                                    const typename Format::Row *rows, int64_t row_stride,
                                                    const typename Format::Stored *const (&columns)[kColumns],
                                                    int64_t stride, int64_t length, Also also) {
    for (int64_t k = 0; k < length; ++k) {
        also(k * stride);
#pragma GCC unroll 4
        for (int step = 0; step < kStepsEach; ++step) {
            typename Format::Loaded loaded[kColumns];
#pragma GCC unroll 4
            for (int c = 0; c < kColumns; ++c) {
                int column_step = kStepsEach > 1 ? step : (kFirstStep + c) % Format::kSteps;
                loaded[c] = Format::load_vector(columns[c] + k * stride, column_step);
            }
            for (int r = 0; r < kRows; ++r) {
                auto row = Format::broadcast(rows + r * row_stride + (k * kStepsEach + step) * Format::kPack);
                for (int c = 0; c < kColumns; ++c) sums[r][c] = Format::dot(sums[r][c], row, loaded[c]);
            }
        }
    }
}

// Attention of kRows rows of a tile, from `first_row` on, over the strips of one segment that any of them sees.
template <typename Format, int kRows> class RowBlock {
  public:
    RowBlock(const Tile<Format> &tile, const Segment &segment, int first_row)
        : tile(tile), segment(segment), first_row(first_row), end_strip(segment.num_strips) {
        int32_t first_seen = tile.first_seen[first_row], last_seen = tile.last_seen[first_row + kRows - 1];
        while (end_strip > 0 && segment.first_token[end_strip - 1] > last_seen) --end_strip;
        while (first_strip < end_strip &&
               segment.first_token[first_strip] + segment.num_tokens[first_strip] <= first_seen)
            ++first_strip;
    }

    // Merges the result into the rows' states, which are `state_size` floats apart.
    void attend(float *states, int64_t state_size) {
        if (first_strip == end_strip) return;
        score_all<kMaxColumns>(first_strip * kStripVectors);
        hide_unseen();
        for (int r = 0; r < kRows; ++r) {
            RowState state{states + r * state_size};
            float max = highest_score(r);
            factors[r] = MergeFactors(state.max(), max);
            state.sum() = factors[r].merge(state.sum(), weigh(r, max));
            state.max() = factors[r].max;
        }
        add_all_values(states, state_size);
    }

  private:
    using Row = typename Format::Row;
    using Sum = typename Format::Sum;
    using Stored = typename Format::Stored;

    template <int kColumns> void score_all(int vector) {
        for (; vector + kColumns <= end_strip * kStripVectors; vector += kColumns) score<kColumns>(vector);
        if constexpr (kColumns > 1) score_all<kColumns / 2>(vector);
    }

    // Computes the scores of the rows for kColumns vectors of keys.
    template <int kColumns> void score(int vector) {
        const Stored *columns[kColumns], *ahead[kColumns];
        for (int c = 0; c < kColumns; ++c) {
            columns[c] = keys_of(vector + c);
            ahead[c] = keys_of(std::min(vector + c + kColumns, end_strip * kStripVectors - 1));
        }
        // With few rows, memory is the bottleneck: at the beginning of each strip the thread would wait for it. So
        // the next keys, and the values, are prefetched while keys are multiplied. The tile's later rows then find
        // them in the cache.
        bool prefetches = first_row == 0;
        int64_t head_dim = tile.head_dim, row_stride = padded_width(head_dim);
        Sum products[kRows][kColumns]{};
        auto prefetch = [&](int64_t offset) __attribute__((always_inline)) {  // otherwise g++ drops it as pure
            if (!prefetches) return;
            for (int c = 0; c < kColumns; ++c) {
                __builtin_prefetch(ahead[c] + offset);
                __builtin_prefetch(columns[c] + Format::keys_size(head_dim) + offset);
            }
        };
        constexpr int64_t kVectorDims = Format::kPack * Format::kSteps;
        multiply<Format, 0, Format::kSteps>(products, tile.queries + first_row * row_stride, row_stride,
                                            columns, Format::kKeyStride,
                                            (head_dim + kVectorDims - 1) / kVectorDims, prefetch);
        for (int c = 0; c < kColumns; ++c)
            for (int r = 0; r < kRows; ++r) {
                floats product = Format::to_floats(products[r][c]);
                char *strip = strip_of(vector + c);
                int token = token_of(vector + c);
                if constexpr (Format::kZeroed) {
                    floats of_zero = load(Format::key_zeros(strip, head_dim) + token) *
                                     tile.query_sums[first_row + r];
                    product = fma(product, load(Format::key_scales(strip, head_dim) + token), of_zero);
                }
                floats scaled = product * tile.query_scales[first_row + r];
                if constexpr (Format::kScaled && !Format::kZeroed)
                    scaled *= load(Format::key_scales(strip, head_dim) + token);
                store(scores[r] + (vector + c) * kLanes, scaled);
            }
    }

    // Sets scores of unseen tokens to -inf, also those of free memory beyond a sequence's tokens, which may be NaN.
    void hide_unseen() {
        int last_row = first_row + kRows - 1;
        for (int s = first_strip; s < end_strip; ++s) {
            int32_t first_token = segment.first_token[s], num_tokens = segment.num_tokens[s];
            if (tile.first_seen[last_row] <= first_token && num_tokens == kStripTokens &&
                first_token + kStripTokens - 1 <= tile.last_seen[first_row])
                continue;
            for (int r = 0; r < kRows; ++r) {
                int begin = tile.first_seen[first_row + r] - first_token;
                int end = std::min(tile.last_seen[first_row + r] + 1 - first_token, num_tokens);
                float *hidden = scores[r] + s * kStripTokens;
                for (int i = 0; i < kStripTokens; i += kLanes) {
                    ints token = lane_numbers() + i;
                    store(hidden + i, (token >= begin) & (token < end) ? load(hidden + i) : splat(-INFINITY));
                }
            }
        }
    }

    float highest_score(int r) const {
        floats highest = splat(-INFINITY);
        for (int i = first_strip * kStripTokens; i < end_strip * kStripTokens; i += kLanes)
            highest = max(highest, load(scores[r] + i));
        return max_of(highest);
    }

    // Turns row r's scores into weights; returns their sum.
    float weigh(int r, float max) {
        floats sum{}, zero_sum{}, shift = splat(max == -INFINITY ? 0 : max);
        for (int i = first_strip * kStripTokens; i < end_strip * kStripTokens; i += kLanes) {
            floats weight = exp2_of_negative(load(scores[r] + i) - shift);
            sum += weight;
            if constexpr (Format::kScaled) {
                int vector = i / kLanes;  // multiply each value's scale into its weight
                floats scale = load(Format::value_scales(strip_of(vector), tile.head_dim) + token_of(vector));
                store(scores[r] + i, weight > 0 ? weight * scale : floats{});
                if constexpr (Format::kZeroed) {
                    floats zero = load(Format::value_zeros(strip_of(vector), tile.head_dim) + token_of(vector));
                    zero_sum = fma(weight, weight > 0 ? zero : floats{}, zero_sum);
                }
            } else {
                store(weights[r] + i, weight);
            }
        }
        if constexpr (Format::kScaled) {
            int first = first_strip * kStripTokens, end = end_strip * kStripTokens;
            weight_scales[r] = Format::pack(scores[r] + first, end - first, weights[r] + first);
            zero_sums[r] = sum_of(zero_sum);
        }
        return sum_of(sum);
    }

    void add_all_values(float *states, int64_t state_size) {
        int vector = 0, num_vectors = Format::num_value_vectors(tile.head_dim);
        for (; vector + kMaxColumns <= num_vectors; vector += kMaxColumns) {
            add_values<kMaxColumns, 0>(vector, states, state_size);
            if constexpr (Format::kSteps > kMaxColumns)
                add_values<kMaxColumns, kMaxColumns>(vector += kMaxColumns, states, state_size);
        }
        if constexpr (Format::kSteps == 1)  // in other formats the number of vectors is even
            for (; vector < num_vectors; ++vector) add_values<1, 0>(vector, states, state_size);
    }

    // Adds the weights times kColumns vectors of values to the rows' states.
    template <int kColumns, int kFirstStep> void add_values(int vector, float *states, int64_t state_size) {
        int64_t stride = Format::value_stride(tile.head_dim);
        int32_t last_seen = tile.last_seen[first_row + kRows - 1];
        Sum products[kRows][kColumns]{};
        for (int s = first_strip; s < end_strip; ++s) {
            const Stored *values = Format::values(segment.strips[s], tile.head_dim);
            const Stored *columns[kColumns];
            for (int c = 0; c < kColumns; ++c) columns[c] = values + Format::value_offset(vector + c);
            int num_tokens = std::min(last_seen + 1 - segment.first_token[s], segment.num_tokens[s]);
            multiply<Format, kFirstStep, 1>(products, weights[0] + s * kStripTokens, int64_t(kSegmentTokens),
                                            columns, stride, (num_tokens + Format::kPack - 1) / Format::kPack,
                                            [](int64_t) {});
        }
        for (int r = 0; r < kRows; ++r)
            for (int c = 0; c < kColumns; ++c) {
                int64_t dim = Format::first_dim(vector + c);
                if (dim >= padded_width(tile.head_dim)) continue;
                float *out = RowState{states + r * state_size}.out() + dim;
                floats added = Format::to_floats(products[r][c]);
                if constexpr (Format::kZeroed)
                    added = fma(added, splat(weight_scales[r]), splat(zero_sums[r]));
                else if constexpr (Format::kScaled)
                    added *= splat(weight_scales[r]);
                store(out, factors[r].merge(load(out), added));
            }
    }

    const Stored *keys_of(int vector) const {
        return Format::keys(strip_of(vector)) + token_of(vector) * Format::kKeyStride / kStripTokens;
    }
    char *strip_of(int vector) const { return segment.strips[vector / kStripVectors]; }
    static int token_of(int vector) { return vector % kStripVectors * kLanes; }

    const Tile<Format> &tile;
    const Segment &segment;
    int first_row, first_strip = 0, end_strip;
    MergeFactors factors[kRows];
    float weight_scales[kRows], zero_sums[kRows];
    alignas(64) float scores[kRows][kSegmentTokens];
    alignas(64) Row weights[kRows][kSegmentTokens];
};
