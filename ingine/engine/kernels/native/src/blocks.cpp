// Products with weights in blocks, out = X W^T + bias: GGUF's kinds, read directly from a model's file, and int4 in a
// layout of its own. All kinds expand to codes of one byte, so there is one algorithm.
//
// W is a list of segments, matrices whose rows follow each other, each of any kind. A panel is 32 rows of a segment.
// 256 columns of a panel at a time ("a chunk") are expanded into the L1 cache (block_formats.h) and multiplied by all
// rows of x (block_tile.h), which are int8 with a scale for each 32 numbers (block_rows.h). Meanwhile the next panel
// is prefetched. Each thread owns a range of panels.
//
// Every output is one accumulator to which groups are added in ascending order, for any number of rows or threads: a
// row's result does not depend on its batch.
#include <omp.h>

#include <vector>

#include "block_tile.h"

namespace {

constexpr int64_t kBlockRows = 480;  // rows of x that share one expansion of a panel

// ingine/engine/kernels/native/block_weights.py has the same numbers.
enum Kind : int32_t { kQ4_0 = 2, kQ4_1 = 3, kQ8_0 = 8, kQ4_K = 12, kQ5_K = 13, kQ6_K = 14, kInt4 = -1 };

}  // namespace

struct Segment {
    const char *data;
    const int64_t *order;  // row i is row order[i] of `data`; null: rows in order
    int64_t rows, row_bytes;
    int64_t group_size;  // int4
    int32_t kind;
};

namespace {

// Calls `call` with an object of the kind's type.
template <class Call> void with_kind(int32_t kind, Call call) {
    switch (kind) {
        case kQ4_0: return call(Q4_0{});
        case kQ4_1: return call(Q4_1{});
        case kQ8_0: return call(Q8_0{});
        case kQ4_K: return call(Q4_K{});
        case kQ5_K: return call(Q5_K{});
        case kQ6_K: return call(Q6_K{});
        case kInt4: return call(Int4{});
    }
}

int64_t panels_of(const Segment &segment) { return (segment.rows + kPanel - 1) / kPanel; }

// Returns 32 rows of a segment from `first` on; beyond its end the last row is repeated.
Source source_of(const Segment &segment, int64_t first) {
    Source source;
    source.group_size = segment.group_size;
    for (int i = 0; i < kPanel; i++) {
        const int64_t row = std::min(first + i, segment.rows - 1);
        source.row[i] = segment.data + (segment.order ? segment.order[row] : row) * segment.row_bytes;
    }
    return source;
}

// A position in the sequence of all segments' panels.
struct Panels {
    const Segment *segment;
    int64_t panel, column;  // panel in the segment, and the segment's first column of the product

    void skip(int64_t count) {
        for (panel += count; panel >= panels_of(*segment); segment++) {
            panel -= panels_of(*segment);
            column += segment->rows;
        }
    }
};

// The weights and outputs of a product.
template <typename T> struct Product {
    const Segment *segments;
    int64_t num_segments;
    const float *bias;  // [n + kPanel] or null
    T *out;             // [rows, n]
    int64_t n, groups;
};

template <class Kind>
void multiply_panel(const Source &source, const Source *next, int64_t next_bytes, const RowGroup *x, int64_t rows,
                    int64_t groups, float *sums) {
    static thread_local Chunk chunk;
    std::memset(sums, 0, rows * kPanel * sizeof(float));
    for (int64_t g = 0; g < groups; g += kGroups) {
        const int64_t count = std::min<int64_t>(kGroups, groups - g);
        const Ahead ahead{next, next_bytes, g, g + count, groups};
        if constexpr (Kind::kPrefetches) {
            if (next)
                Kind::expand_and_prefetch(source, g, count, chunk, ahead);
            else
                Kind::expand(source, g, count, chunk);
        } else {
            if (next) ahead.prefetch(0, kPanel);
            Kind::expand(source, g, count, chunk);
        }
        multiply_chunk<Kind>(x + g * rows, rows, chunk, count, sums);
    }
}

// Multiplies the calling thread's share of the panels by some rows.
template <typename T> void multiply(const Product<T> &p, const RowGroup *x, int64_t start, int64_t rows) {
    alignas(64) static thread_local float sums[kBlockRows * kPanel];
    const int64_t thread = omp_get_thread_num(), num_threads = omp_get_num_threads();
    int64_t all = 0;
    for (int64_t i = 0; i < p.num_segments; i++) all += panels_of(p.segments[i]);
    const int64_t count = all * (thread + 1) / num_threads - all * thread / num_threads;
    if (count == 0) return;
    Panels at{p.segments, 0, 0};
    at.skip(all * thread / num_threads);
    Source source = source_of(*at.segment, at.panel * kPanel), next;
    for (int64_t i = 0; i < count; i++) {
        Panels following = at;
        if (i + 1 < count) {
            following.skip(1);
            next = source_of(*following.segment, following.panel * kPanel);
        }
        with_kind(at.segment->kind, [&](auto kind) {
            multiply_panel<decltype(kind)>(source, i + 1 < count ? &next : nullptr, following.segment->row_bytes, x,
                                           rows, p.groups, sums);
        });
        const int64_t columns = std::min<int64_t>(kPanel, at.segment->rows - at.panel * kPanel);
        const int64_t first = at.column + at.panel * kPanel;
        for (int64_t row = 0; row < rows; row++)
            for (int64_t c = 0; c < columns; c += kLanes) {
                floats v = load(sums + row * kPanel + c);
                if (p.bias) v = v + load(p.bias + first + c);
                store(p.out + (start + row) * p.n + first + c, v, columns - c);
            }
        at = following, source = next;
    }
}

template <typename T>
void multiply_rows(const Product<T> &product, const T *x, int64_t rows, int64_t k) {
    static thread_local std::vector<RowGroup> quantized_rows;
    const int64_t chunks = (product.groups + kGroups - 1) / kGroups;
    quantized_rows.resize(std::min(rows, kBlockRows) * chunks * kGroups);
    RowGroup *quantized = quantized_rows.data();
    for (int64_t start = 0; start < rows; start += kBlockRows) {
        const int64_t count = std::min(kBlockRows, rows - start);
#pragma omp parallel
        {
#pragma omp for
            for (int64_t row = 0; row < count; row++)
                quantize_groups(x + (start + row) * k, k, quantized + row * kGroups, count * kGroups);
            multiply(product, quantized, start, count);
        }
    }
}

// Writes the numbers (code - zero) * scale + min of one column of a chunk, in the order of k.
template <class Kind, typename T> void write_column(const Chunk &from, int column, int64_t groups, T *out) {
    for (int64_t i = 0; i < groups * kGroupNumbers; i++) {
        const uint8_t byte = uint32_t(from.codes[i / 4][column]) >> i % 4 * 8;
        const int code = Kind::kBits == 8 && Kind::kZero == 0 ? int8_t(byte) : byte - Kind::kZero;
        float number = from.scale[i / Kind::kGroup][column] * float(code);
        asm("" : "+m"(number));  // otherwise it is fused with the sum, and the bits differ from other dequantisers
        if constexpr (Kind::kHasMin) number += from.min[i / kGroupNumbers][column];
        out[i] = from_float<T>(number);
    }
}

template <class Kind, typename T>
void gather_rows(const Segment &segment, const int64_t *ids, int64_t count, int64_t k, T *out) {
    const int64_t groups = k / kGroupNumbers, per_panel = Kind::kPacked ? 1 : kPanel;
#pragma omp parallel for if (count > per_panel)
    for (int64_t first = 0; first < count; first += per_panel) {
        static thread_local Chunk chunk;
        const int64_t here = std::min(per_panel, count - first);
        Source source;
        source.group_size = segment.group_size;
        for (int i = 0; i < kPanel; i++) {
            const int64_t id = ids[first + std::min<int64_t>(i, here - 1)];
            const int64_t row = segment.order ? segment.order[id] : id;
            source.row[i] = segment.data + (Kind::kPacked ? row / kPanel * kPanel : row) * segment.row_bytes;
        }
        for (int64_t g = 0; g < groups; g += kGroups) {
            const int64_t some = std::min<int64_t>(kGroups, groups - g);
            Kind::expand(source, g, some, chunk);
            for (int64_t i = 0; i < here; i++)
                write_column<Kind>(chunk, Kind::kPacked ? ids[first] % kPanel : i, some,
                                   out + (first + i) * k + g * kGroupNumbers);
        }
    }
}

}  // namespace

// x [rows, k] and out [rows, n] are of `dtype`, n is the sum of the segments' rows. x is quantized first. k % 32 == 0,
// and k % 256 == 0 for kinds with superblocks.
EXPORT void ingine_blocks(int32_t dtype, const void *x, const Segment *segments, int64_t num_segments,
                          const float *bias, void *out, int64_t rows, int64_t n, int64_t k) {
    const int64_t groups = k / kGroupNumbers;
    if (dtype == kBFloat16)
        multiply_rows<bfloat16>({segments, num_segments, bias, (bfloat16 *)out, n, groups}, (const bfloat16 *)x, rows,
                                k);
    else
        multiply_rows<float>({segments, num_segments, bias, (float *)out, n, groups}, (const float *)x, rows, k);
}

// out[i] = row ids[i] of the segment, [count, k] of `dtype`: the embedding of a vocabulary matrix.
EXPORT void ingine_blocks_gather(int32_t dtype, const Segment *segment, const int64_t *ids, int64_t count, int64_t k,
                                 void *out) {
    with_kind(segment->kind, [&](auto kind) {
        if (dtype == kBFloat16)
            gather_rows<decltype(kind)>(*segment, ids, count, k, (bfloat16 *)out);
        else
            gather_rows<decltype(kind)>(*segment, ids, count, k, (float *)out);
    });
}

// Packs codes [n, k / 2] (even columns are the low four bits), and scales and zeros [n, k / group_size] of binary16,
// into panels of [n rounded up to a multiple of 32][k / 2 + 4 * k / group_size] bytes; the last panel is padded with
// zeros.
EXPORT void ingine_blocks_pack_int4(const uint8_t *codes, const uint16_t *scales, const uint16_t *zeros, int64_t n,
                                    int64_t k, int64_t group_size, char *packed) {
    const int64_t per_scale = group_size / kGroupNumbers, per_row = k / group_size;
    const int64_t padded = (n + kPanel - 1) / kPanel * kPanel, row_bytes = k / 2 + 4 * per_row;
#pragma omp parallel for
    for (int64_t row = 0; row < padded; row++) {
        char *panel = packed + row / kPanel * kPanel * row_bytes;
        const int64_t lane = row % kPanel;
        const auto code = [&](int64_t column) {
            return row < n ? codes[(row * k + column) / 2] >> column % 2 * 4 & 15 : 0;
        };
        for (int64_t i = 0; i < per_row; i++) {
            uint16_t *head = (uint16_t *)(panel + Int4::head(i * per_scale, per_scale));
            head[lane] = row < n ? scales[row * per_row + i] : 0;
            head[kPanel + lane] = row < n ? zeros[row * per_row + i] : 0;
        }
        for (int64_t g = 0; g < k / kGroupNumbers; g++)
            for (int i = 0; i < 16; i++)
                panel[Int4::codes(g, per_scale) + (i / 4 * kPanel + lane) * 4 + i % 4] =
                    char(code(g * kGroupNumbers + i) | code(g * kGroupNumbers + 16 + i) << 4);
    }
}
