// Attention over paged KV: writes a step's keys and values, then attends. See attention_tile.h for the core.
//
// Work is split into items. An item is a tile of rows over all segments or, if a sequence has only one tile, over one
// segment; a second pass merges the latter. Items are sorted by cost, largest first, and threads take them one by one.
#include <algorithm>
#include <numeric>

#include "attention_tile.h"
#include "rotary.h"

enum KVFormatNumber : int32_t { kModelDType = 0, kInt8 = 1, kInt4 = 2 };

// ingine/engine/kernels/attention/native.py has the same structures.
struct Item {
    int32_t seq, first_row, end_row, first_segment, end_segment;
    int32_t first_partial;  // index of its rows' first partial result; -1: the item writes the output
};

struct Step {
    const int64_t *slot_mapping;
    const int32_t *block_tables, *query_start_loc, *seq_lens;
    Item *items;
    float *partials;  // [num_kv_heads, num_partials, RowState::size(head_dim)]
    int32_t num_seqs, block_table_stride, num_heads, num_kv_heads, head_dim, block_size;
    int32_t sliding_window;  // 0: none
    int32_t dtype, kv_format, num_items, num_partials, state_size;

    int64_t group_size() const { return num_heads / num_kv_heads; }
    int64_t strips_per_block() const { return (block_size + kStripTokens - 1) / kStripTokens; }
    int query_len(int seq) const { return query_start_loc[seq + 1] - query_start_loc[seq]; }

    int32_t position(int seq, int64_t row) const {
        return int32_t(seq_lens[seq] - query_len(seq) + row / group_size());
    }
    int32_t first_seen(int32_t position) const {
        return sliding_window ? std::max(0, position - sliding_window + 1) : 0;
    }
    int64_t strip_of(int32_t token) const {
        return token / block_size * strips_per_block() + token % block_size / kStripTokens;
    }
    int first_segment(int seq, int64_t first_row) const {
        return int(strip_of(first_seen(position(seq, first_row))) / kSegmentStrips);
    }
    int end_segment(int seq, int64_t end_row) const {
        return int(strip_of(position(seq, end_row - 1)) / kSegmentStrips) + 1;
    }
};

template <typename T> struct Inputs {
    const T *query, *key, *value;  // [num_tokens, heads, head_dim]
    int64_t query_stride, key_stride, value_stride;  // between tokens
    const T *cos, *sin;  // [num_tokens, head_dim], or null
    char *kv_cache;  // [num_blocks, num_kv_heads, strips_per_block] strips
    T *output;  // [num_tokens, num_heads, head_dim]
};

template <typename Format, typename T> class Attention {
  public:
    Attention(const Step &step, const Inputs<T> &inputs, float scale)
        : step(step), in(inputs), score_scale(scale * 1.44269504f), head_dim(step.head_dim),
          state_size(RowState::size(step.head_dim)) {}

    void run() {
        int64_t num_tokens = step.query_start_loc[step.num_seqs];
        int64_t num_items = int64_t(step.num_items) * step.num_kv_heads;
#pragma omp parallel
        {
#pragma omp for schedule(static)
            for (int64_t token = 0; token < num_tokens; ++token) write(token, num_tokens);
#pragma omp for schedule(dynamic) nowait
            for (int64_t i = 0; i < num_items; ++i)
                attend(step.items[i / step.num_kv_heads], int(i % step.num_kv_heads));
            if (step.num_partials) {
#pragma omp barrier
#pragma omp for schedule(dynamic) nowait
                for (int64_t i = 0; i < num_items; ++i)
                    reduce(step.items[i / step.num_kv_heads], int(i % step.num_kv_heads));
            }
        }
    }

  private:
    void write(int64_t token, int64_t num_tokens) const {
        int64_t slot = step.slot_mapping[token], offset = slot % step.block_size;
        // The next slot is not free if this step writes it too, perhaps in another thread.
        bool next_is_free = token + 1 == num_tokens || step.slot_mapping[token + 1] != slot + 1 ||
                            offset + 1 == step.block_size;
        alignas(64) float key[kMaxHeadDim], value[kMaxHeadDim];
        for (int head = 0; head < step.num_kv_heads; ++head) {
            rotate_row(in.key + token * in.key_stride + head * head_dim, at(in.cos, token), at(in.sin, token),
                       head_dim, key);
            rotate_row<T>(in.value + token * in.value_stride + head * head_dim, nullptr, nullptr, head_dim,
                          value);
            write_kv<Format>(strip(slot / step.block_size, head, offset / kStripTokens), offset % kStripTokens,
                             key, value, head_dim, next_is_free);
        }
    }

    void attend(const Item &item, int kv_head) const {
        Tile<Format> tile;
        load_queries(item, kv_head, tile);
        alignas(64) float own_states[kTileRows * (RowState::kOut + kMaxHeadDim)];
        float *states = item.first_partial < 0 ? own_states : partial(kv_head, item.first_partial);
        for (int r = 0; r < tile.num_rows; ++r) RowState{states + r * state_size}.clear(head_dim);
        for (int s = item.first_segment; s < item.end_segment; ++s)
            attend_segment(tile, locate(item, kv_head, s), states);
        if (item.first_partial < 0) write_output(item, kv_head, states);
    }

    // If a tile was split into items by segment, merges their results into the first one.
    void reduce(const Item &item, int kv_head) const {
        if (item.first_partial < 0) return;
        if (item.first_segment != step.first_segment(item.seq, item.first_row)) return;
        int num_rows = item.end_row - item.first_row;
        int num_segments = step.end_segment(item.seq, item.end_row) - item.first_segment;
        float *states = partial(kv_head, item.first_partial);
        for (int i = num_rows; i < num_segments * num_rows; ++i) {
            RowState into{states + i % num_rows * state_size}, from{states + i * state_size};
            MergeFactors factors(into.max(), from.max());
            into.max() = factors.max;
            into.sum() = factors.merge(into.sum(), from.sum());
            for (int64_t d = 0; d < head_dim; d += kLanes)
                store(into.out() + d, factors.merge(load(into.out() + d), load(from.out() + d)));
        }
        write_output(item, kv_head, states);
    }

    void load_queries(const Item &item, int kv_head, Tile<Format> &tile) const {
        tile.num_rows = item.end_row - item.first_row;
        tile.head_dim = head_dim;
        alignas(64) float query[kMaxHeadDim];
        for (int r = 0; r < tile.num_rows; ++r) {
            auto [token, head] = token_and_head(item, kv_head, r);
            rotate_row(in.query + token * in.query_stride + head * head_dim, at(in.cos, token),
                       at(in.sin, token), head_dim, query);
            Format::change_basis(query, head_dim);
            int64_t size = padded_width(head_dim);
            auto *packed = tile.queries + r * size;
            tile.query_scales[r] = score_scale * Format::pack(query, size, packed);
            if constexpr (Format::kZeroed) tile.query_sums[r] = float(std::accumulate(packed, packed + size, 0));
            tile.last_seen[r] = step.position(item.seq, item.first_row + r);
            tile.first_seen[r] = step.first_seen(tile.last_seen[r]);
        }
    }

    Segment locate(const Item &item, int kv_head, int index) const {
        Segment segment;
        int64_t first = int64_t(index) * kSegmentStrips, per_block = step.strips_per_block();
        int64_t end = step.strip_of(step.position(item.seq, item.end_row - 1)) + 1;
        segment.num_strips = int(std::min<int64_t>(end - first, kSegmentStrips));
        for (int i = 0; i < segment.num_strips; ++i) {
            int64_t block = (first + i) / per_block, offset = (first + i) % per_block;
            const int32_t *block_table = step.block_tables + int64_t(item.seq) * step.block_table_stride;
            segment.strips[i] = strip(block_table[block], kv_head, offset);
            segment.first_token[i] = int32_t(block * step.block_size + offset * kStripTokens);
            segment.num_tokens[i] =
                int32_t(std::min<int64_t>(kStripTokens, step.block_size - offset * kStripTokens));
        }
        return segment;
    }

    void attend_segment(const Tile<Format> &tile, const Segment &segment, float *states) const {
        int row = 0;
        for (; row + kMaxRows <= tile.num_rows; row += kMaxRows)
            attend_rows<kMaxRows>(tile, segment, row, states);
        switch (tile.num_rows - row) {
        case 5: return attend_rows<5>(tile, segment, row, states);
        case 4: return attend_rows<4>(tile, segment, row, states);
        case 3: return attend_rows<3>(tile, segment, row, states);
        case 2: return attend_rows<2>(tile, segment, row, states);
        case 1: return attend_rows<1>(tile, segment, row, states);
        }
    }

    template <int kRows>
    void attend_rows(const Tile<Format> &tile, const Segment &segment, int row, float *states) const {
        RowBlock<Format, kRows>(tile, segment, row).attend(states + row * state_size, state_size);
    }

    void write_output(const Item &item, int kv_head, float *states) const {
        for (int r = 0; r < item.end_row - item.first_row; ++r) {
            RowState state{states + r * state_size};
            auto [token, head] = token_and_head(item, kv_head, r);
            T *out = in.output + (token * step.num_heads + head) * head_dim;
            floats inverse = splat(1 / state.sum());
            alignas(64) float attended[kMaxHeadDim];
            for (int64_t d = 0; d < head_dim; d += kLanes) store(attended + d, load(state.out() + d) * inverse);
            Format::change_basis(attended, head_dim);
            for (int64_t d = 0; d < head_dim; d += kLanes) store(out + d, load(attended + d), head_dim - d);
        }
    }

    struct TokenAndHead {
        int64_t token, head;
    };
    TokenAndHead token_and_head(const Item &item, int kv_head, int row) const {
        int64_t group_size = step.group_size(), index = item.first_row + row;
        return {step.query_start_loc[item.seq] + index / group_size, kv_head * group_size + index % group_size};
    }

    const T *at(const T *rotation, int64_t token) const {
        return rotation == nullptr ? nullptr : rotation + token * head_dim;
    }
    char *strip(int64_t block, int head, int64_t index) const {
        int64_t number = (block * step.num_kv_heads + head) * step.strips_per_block() + index;
        return in.kv_cache + number * strip_bytes<Format>(head_dim);
    }
    float *partial(int kv_head, int index) const {
        return step.partials + (int64_t(kv_head) * step.num_partials + index) * state_size;
    }

    const Step &step;
    const Inputs<T> &in;
    float score_scale;
    int64_t head_dim, state_size;
};

// Sets num_items, num_partials and state_size, and fills `items` unless it is null.
EXPORT void ingine_attention_plan(Step *step) {
    step->num_items = step->num_partials = 0;
    step->state_size = int32_t(RowState::size(step->head_dim));
    auto add = [&](Item item) {
        if (step->items != nullptr) step->items[step->num_items] = item;
        ++step->num_items;
    };
    for (int seq = 0; seq < step->num_seqs; ++seq) {
        int num_rows = int(step->query_len(seq) * step->group_size());
        int first = step->first_segment(seq, 0), end = step->end_segment(seq, num_rows);
        if (num_rows <= kTileRows && end - first > 1) {
            for (int segment = first; segment < end; ++segment) {
                add({seq, 0, num_rows, segment, segment + 1, step->num_partials});
                step->num_partials += num_rows;
            }
            continue;
        }
        for (int row = 0; row < num_rows; row += kTileRows) {
            int end_row = std::min(row + kTileRows, num_rows);
            add({seq, row, end_row, step->first_segment(seq, row), step->end_segment(seq, end_row), -1});
        }
    }
    if (step->items == nullptr) return;
    auto cost = [&](const Item &item) {
        int64_t end = step->strip_of(step->position(item.seq, item.end_row - 1)) + 1;
        end = std::min<int64_t>(end, int64_t(item.end_segment) * kSegmentStrips);
        return (end - int64_t(item.first_segment) * kSegmentStrips) * (item.end_row - item.first_row);
    };
    std::stable_sort(step->items, step->items + step->num_items,
                     [&](const Item &a, const Item &b) { return cost(a) > cost(b); });
}

template <typename Call> static auto with_format(int32_t dtype, int32_t kv_format, Call call) {
    if (kv_format == kInt8)
        return dtype == kFloat32 ? call(Int8KV{}, float{}) : call(Int8KV{}, bfloat16{});
    if (kv_format == kInt4)
        return dtype == kFloat32 ? call(Int4KV{}, float{}) : call(Int4KV{}, bfloat16{});
    return dtype == kFloat32 ? call(Float32KV{}, float{}) : call(BFloat16KV{}, bfloat16{});
}

// Returns the bytes of one block with all its KV heads.
EXPORT int64_t ingine_kv_block_bytes(int64_t block_size, int64_t num_kv_heads, int64_t head_dim, int32_t dtype,
                                     int32_t kv_format) {
    int64_t num_strips = (block_size + kStripTokens - 1) / kStripTokens * num_kv_heads;
    return with_format(dtype, kv_format, [&](auto format, auto) {
        return num_strips * strip_bytes<decltype(format)>(head_dim);
    });
}

EXPORT void ingine_attention(const Step *step, const void *query, int64_t query_stride, const void *key,
                             int64_t key_stride, const void *value, int64_t value_stride, const void *cos,
                             const void *sin, void *kv_cache, void *output, float scale) {
    with_format(step->dtype, step->kv_format, [&](auto format, auto number) {
        using T = decltype(number);
        Inputs<T> inputs{(const T *)query, (const T *)key,  (const T *)value, query_stride,
                         key_stride,       value_stride,    (const T *)cos,   (const T *)sin,
                         (char *)kv_cache, (T *)output};
        Attention<decltype(format), T>(*step, inputs, scale).run();
    });
}
