// The kinds of weights in blocks, and how each is expanded: from the stored blocks, some groups of 32 numbers of 32
// rows ("a panel") become codes of one byte, scales and minima, in the order in which block_tile.h multiplies them. A
// weight is (code - zero) * scale + min.
//
// A kind has
//
//   kBits                     bits of a code; all are unsigned, except 8 bits where kZeroOfBytes is 0
//   kZero                     a whole number that is added to all its codes
//   kGroup                    how many numbers share a scale, 32 or 16
//   kHasMin                   whether a group of 32 has a minimum
//   kPacked                   whether its panels are from pack_int4, not rows of blocks
//   expand(source, g, n, to)  expands groups g to g + n of 32 numbers (n <= 8, g % 8 == 0)
//   expand_and_prefetch(...)  only in kinds with kPrefetches: expands, and prefetches rows of the next panel
//
// The layouts are those of llama.cpp (ggml-common.h). Loads stay within a block and need no alignment.
#pragma once
#include <algorithm>

#include "block_dot.h"
#include "block_rows.h"

constexpr int kPanel = 32;  // rows of the weights, which are columns of the product
constexpr int kGroupNumbers = 32;

struct Chunk {
    alignas(64) int32_t codes[kGroups * kGroupNumbers / 4][kPanel];  // each has four codes of a column
    alignas(64) float scale[kGroups * 2][kPanel];
    alignas(64) float min[kGroups][kPanel];
};

// The addresses of a panel's rows, and the parameter of int4.
struct Source {
    const char *row[kPanel];
    int64_t group_size;  // int4: number of columns that share a scale
};

// A part of the next panel's rows to prefetch: from `from` / `of` to `to` / `of` of each row's bytes.
struct Ahead {
    const Source *source;
    int64_t row_bytes, from, to, of;

    __attribute__((always_inline)) void prefetch(int first, int last) const {  // otherwise g++ drops it as pure
        const int64_t begin = row_bytes * from / of, end = row_bytes * to / of;
        for (int i = first; i < last; i++) {
            const char *row = source->row[i], *line = row + begin;
            for (line += -(uintptr_t)line % 64; line < row + end; line += 64) __builtin_prefetch(line, 0, 2);
        }
    }
};

// Converts the binary16 in the low half of each lane.
inline floats from_halves(ints halves) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
    return _mm512_maskz_cvtph_ps(-1, (__m256i)__builtin_convertvector(halves, shorts));
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
    return _mm256_cvtph_ps((__m128i)__builtin_convertvector(halves, shorts));
#elif defined(__aarch64__)
    return vcvt_f32_f16((float16x4_t)__builtin_convertvector(halves, shorts));
#else
    const uints magnitude = ((uints)halves & 0x7fff) << 13;
    const floats finite = (floats)magnitude * 0x1p112f;
    const uints bits = magnitude >= 0x0f800000 ? magnitude | 0x7f800000 : (uints)finite;
    return (floats)(bits | ((uints)halves & 0x8000) << 16);
#endif
}

inline ints load_16_bytes_of_rows(const char *const *rows, int64_t offset) {
#if defined(__AVX2__) && defined(__FMA__)
    const auto part = [&](int row) { return _mm_loadu_si128((const __m128i *)(rows[row] + offset)); };
    const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(part(0)), part(4), 1);
#if defined(__AVX512F__) && defined(__AVX512BW__)
    const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(part(8)), part(12), 1);
    return (ints)_mm512_maskz_inserti64x4(-1, _mm512_castsi256_si512(low), high, 1);  // as in max
#else
    return (ints)low;
#endif
#else
    return load_as<ints>(rows[0] + offset);
#endif
}

// Loads 16 bytes of each of kLanes rows: bytes 0 to 3 of all rows into the first vector, 4 to 7 into the second ...
inline void load_transposed(const char *const *rows, int64_t offset, ints (&out)[4]) {
    const ints lane = lane_numbers(), in_four = lane & 3, first = lane & ~3;
    const ints low = first + (in_four >> 1) + (in_four & 1) * kLanes;        // a0 b0 a1 b1
    const ints low_pair = first + (in_four & 1) + (in_four >> 1) * kLanes;   // a0 a1 b0 b1
    const ints a = load_16_bytes_of_rows(rows, offset), b = load_16_bytes_of_rows(rows + 1, offset);
    const ints c = load_16_bytes_of_rows(rows + 2, offset), d = load_16_bytes_of_rows(rows + 3, offset);
    const ints ab = __builtin_shuffle(a, b, low), ab_high = __builtin_shuffle(a, b, low + 2);
    const ints cd = __builtin_shuffle(c, d, low), cd_high = __builtin_shuffle(c, d, low + 2);
    out[0] = __builtin_shuffle(ab, cd, low_pair), out[1] = __builtin_shuffle(ab, cd, low_pair + 2);
    out[2] = __builtin_shuffle(ab_high, cd_high, low_pair), out[3] = __builtin_shuffle(ab_high, cd_high, low_pair + 2);
}

inline ints low_nibbles(ints v) { return v & 0x0f0f0f0f; }
inline ints high_nibbles(ints v) { return (v >> 4) & 0x0f0f0f0f; }

inline floats byte_as_float(ints v, int byte) { return __builtin_convertvector((v >> 8 * byte) & 0xff, floats); }
inline floats signed_byte_as_float(ints v, int byte) {
    return __builtin_convertvector(v << (24 - 8 * byte) >> 24, floats);
}

// Loads four bytes of each of kLanes rows.
inline ints load_heads(const char *const *rows, int64_t offset) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
    const auto eight = [&](int first) {
        const __m512i at = _mm512_loadu_si512(rows + first);
        return _mm512_mask_i64gather_epi32(_mm256_setzero_si256(), -1, at, (const void *)offset, 1);
    };
    return (ints)_mm512_maskz_inserti64x4(-1, _mm512_castsi256_si512(eight(0)), eight(8), 1);
#else
    ints heads;
    for (int lane = 0; lane < kLanes; lane++) heads[lane] = load_as<int32_t>(rows[lane] + offset);
    return heads;
#endif
}

inline floats low_half(ints v) { return from_halves(v & 0xffff); }
inline floats high_half(ints v) { return from_halves((v >> 16) & 0xffff); }

// Calls expand_lanes(rows, offset, group, column) for all columns of a panel, kLanes at a time, and for all blocks of
// BYTES bytes from group g on.
template <int BYTES, int GROUPS, class ExpandLanes>
inline void expand_blocks(const Source &from, int64_t g, int64_t n, ExpandLanes expand_lanes) {
    for (int column = 0; column < kPanel; column += kLanes)
        for (int64_t i = 0; i < n; i += GROUPS)
            expand_lanes(from.row + column, (g + i) / GROUPS * BYTES, i, column);
}

struct RowsOfBlocks {
    static constexpr int kGroup = 32, kZero = 0;
    static constexpr bool kHasMin = false, kPacked = false, kPrefetches = false;
};

struct Q8_0 : RowsOfBlocks {
    static constexpr int kBits = 8, kZero = kZeroOfBytes;
    // This kind has the most bytes for the least work: prefetching them all at once would delay its own loads.
    static constexpr bool kPrefetches = true;

    static void expand(const Source &from, int64_t g, int64_t n, Chunk &to) {
        expand_blocks<34, 1>(from, g, n, [&](const char *const *rows, int64_t at, int64_t i, int column) {
            expand_lanes(rows, at, i, column, to);
        });
    }

    static void expand_and_prefetch(const Source &from, int64_t g, int64_t n, Chunk &to, const Ahead &ahead) {
        int unit = 0;
        const int units = int(n) * kPanel / kLanes;
        expand_blocks<34, 1>(from, g, n, [&](const char *const *rows, int64_t at, int64_t i, int column) {
            ahead.prefetch(kPanel * unit / units, kPanel * (unit + 1) / units);
            unit++;
            expand_lanes(rows, at, i, column, to);
        });
    }

  private:
    static void expand_lanes(const char *const *rows, int64_t at, int64_t i, int column, Chunk &to) {
        store(to.scale[i] + column, low_half(load_heads(rows, at)));
        for (int half = 0; half < 2; half++) {
            ints bytes[4];
            load_transposed(rows, at + 2 + 16 * half, bytes);
            for (int u = 0; u < 4; u++)
                store_as(to.codes[8 * i + 4 * half + u] + column,
                         kZero ? bytes[u] ^ (ints{} + int32_t(0x80808080)) : bytes[u]);
        }
    }
};

// Expands 16 bytes with numbers 0 to 15 of a group in their low halves and 16 to 31 in their high halves.
inline void expand_nibbles(const char *const *rows, int64_t at, int64_t i, int column, Chunk &to) {
    ints bytes[4];
    load_transposed(rows, at, bytes);
    for (int u = 0; u < 4; u++) {
        store_as(to.codes[8 * i + u] + column, low_nibbles(bytes[u]));
        store_as(to.codes[8 * i + 4 + u] + column, high_nibbles(bytes[u]));
    }
}

struct Q4_0 : RowsOfBlocks {
    static constexpr int kBits = 4, kZero = 8;

    static void expand(const Source &from, int64_t g, int64_t n, Chunk &to) {
        expand_blocks<18, 1>(from, g, n, [&](const char *const *rows, int64_t at, int64_t i, int column) {
            store(to.scale[i] + column, low_half(load_heads(rows, at)));
            expand_nibbles(rows, at + 2, i, column, to);
        });
    }
};

struct Q4_1 : RowsOfBlocks {
    static constexpr int kBits = 4;
    static constexpr bool kHasMin = true;

    static void expand(const Source &from, int64_t g, int64_t n, Chunk &to) {
        expand_blocks<20, 1>(from, g, n, [&](const char *const *rows, int64_t at, int64_t i, int column) {
            const ints head = load_heads(rows, at);
            store(to.scale[i] + column, low_half(head));
            store(to.min[i] + column, high_half(head));
            expand_nibbles(rows, at + 4, i, column, to);
        });
    }
};

// Expands the first 16 bytes of Q4_K and Q5_K: scales and minima of eight groups, 6 bits each.
inline void expand_six_bit_scales(const char *const *rows, int64_t at, int column, Chunk &to) {
    ints head[4];
    load_transposed(rows, at, head);
    const floats d = low_half(head[0]), d_min = high_half(head[0]);
    const ints scales[] = {head[1] & 0x3f3f3f3f, low_nibbles(head[3]) | ((head[1] >> 2) & 0x30303030)};
    const ints mins[] = {head[2] & 0x3f3f3f3f, high_nibbles(head[3]) | ((head[2] >> 2) & 0x30303030)};
    for (int i = 0; i < kGroups; i++) {
        store(to.scale[i] + column, d * byte_as_float(scales[i / 4], i % 4));
        store(to.min[i] + column, -(d_min * byte_as_float(mins[i / 4], i % 4)));
    }
}

struct Q4_K : RowsOfBlocks {
    static constexpr int kBits = 4;
    static constexpr bool kHasMin = true;

    static void expand(const Source &from, int64_t g, int64_t n, Chunk &to) {
        expand_blocks<144, kGroups>(from, g, n, [&](const char *const *rows, int64_t at, int64_t, int column) {
            expand_six_bit_scales(rows, at, column, to);
            for (int part = 0; part < 8; part++) {  // a pair of groups is 32 bytes
                ints bytes[4];
                load_transposed(rows, at + 16 + 16 * part, bytes);
                for (int u = 0; u < 4; u++) {
                    const int unit = part / 2 * 16 + part % 2 * 4 + u;
                    store_as(to.codes[unit] + column, low_nibbles(bytes[u]));
                    store_as(to.codes[unit + 8] + column, high_nibbles(bytes[u]));
                }
            }
        });
    }
};

struct Q5_K : RowsOfBlocks {
    static constexpr int kBits = 5;
    static constexpr bool kHasMin = true;

    static void expand(const Source &from, int64_t g, int64_t n, Chunk &to) {
        expand_blocks<176, kGroups>(from, g, n, [&](const char *const *rows, int64_t at, int64_t, int column) {
            expand_six_bit_scales(rows, at, column, to);
            for (int half = 0; half < 2; half++) {
                ints fifth[4];  // bit i of a byte belongs to group i
                load_transposed(rows, at + 16 + 16 * half, fifth);
                for (int pair = 0; pair < 4; pair++) {
                    ints bytes[4];
                    load_transposed(rows, at + 48 + 32 * pair + 16 * half, bytes);
                    for (int u = 0; u < 4; u++) {
                        const int unit = pair * 16 + half * 4 + u;
                        const ints bits = fifth[u] >> 2 * pair;
                        store_as(to.codes[unit] + column, low_nibbles(bytes[u]) | ((bits & 0x01010101) << 4));
                        store_as(to.codes[unit + 8] + column,
                                 high_nibbles(bytes[u]) | (((bits >> 1) & 0x01010101) << 4));
                    }
                }
            }
        });
    }
};

struct Q6_K : RowsOfBlocks {
    static constexpr int kBits = 6, kZero = 32, kGroup = 16;

    static void expand(const Source &from, int64_t g, int64_t n, Chunk &to) {
        expand_blocks<210, kGroups>(from, g, n, [&](const char *const *rows, int64_t at, int64_t, int column) {
            ints scales[4];
            load_transposed(rows, at + 192, scales);
            const floats d = high_half(load_heads(rows, at + 206));
            for (int i = 0; i < 16; i++)
                store(to.scale[i] + column, d * signed_byte_as_float(scales[i / 4], i % 4));
            // Half of the block is four groups: 64 bytes with the low four bits, and 32 with the two high bits, of
            // each code.
            for (int half = 0; half < 2; half++)
                for (int part = 0; part < 2; part++) {
                    ints high[4], first[4], second[4];
                    load_transposed(rows, at + 128 + 32 * half + 16 * part, high);
                    load_transposed(rows, at + 64 * half + 16 * part, first);
                    load_transposed(rows, at + 64 * half + 32 + 16 * part, second);
                    for (int u = 0; u < 4; u++) {
                        const auto write = [&](int group, ints low, ints two) {
                            store_as(to.codes[half * 32 + group * 8 + part * 4 + u] + column,
                                     low | (two & 0x30303030));
                        };
                        write(0, low_nibbles(first[u]), high[u] << 4);
                        write(1, low_nibbles(second[u]), high[u] << 2);
                        write(2, high_nibbles(first[u]), high[u]);
                        write(3, high_nibbles(second[u]), high[u] >> 2);
                    }
                }
        });
    }
};

// A panel is one stream: for each group_size columns 32 scales and 32 zeros (binary16), then for each 32 columns
// [4][32 rows][4 bytes], with numbers 0 to 15 in the low halves.
struct Int4 {
    static constexpr int kBits = 4, kGroup = 32, kZero = 0;
    static constexpr bool kHasMin = true, kPacked = true, kPrefetches = false;
    static constexpr int64_t kHeadBytes = 2 * kPanel * 2, kCodeBytes = kPanel * 16;

    // Offsets of the scales and of the codes of the 32 columns of group g.
    static int64_t head(int64_t g, int64_t per_scale) { return g / per_scale * (kHeadBytes + per_scale * kCodeBytes); }
    static int64_t codes(int64_t g, int64_t per_scale) {
        return head(g, per_scale) + kHeadBytes + g % per_scale * kCodeBytes;
    }

    static void expand(const Source &from, int64_t g, int64_t n, Chunk &to) {
        const int64_t per_scale = from.group_size / kGroupNumbers;
        for (int64_t i = 0; i < n; i++) {
            const char *scales = from.row[0] + head(g + i, per_scale), *zeros = scales + kPanel * 2;
            const char *codes = from.row[0] + Int4::codes(g + i, per_scale);
            for (int column = 0; column < kPanel; column += kLanes) {
                const auto halves = [&](const char *of) {
                    return from_halves(__builtin_convertvector(load_as<ushorts>(of + column * 2), ints));
                };
                const floats scale = halves(scales);
                store(to.scale[i] + column, scale);
                store(to.min[i] + column, -(halves(zeros) * scale));
                for (int u = 0; u < 4; u++) {
                    const ints bytes = load_as<ints>(codes + (u * kPanel + column) * 4);
                    store_as(to.codes[8 * i + u] + column, low_nibbles(bytes));
                    store_as(to.codes[8 * i + 4 + u] + column, high_nibbles(bytes));
                }
            }
        }
    }
};
