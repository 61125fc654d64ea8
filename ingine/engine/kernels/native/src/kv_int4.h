// Keys and values in 4 bits, in the basis of a Hadamard matrix. Each token and head has a scale and a zero, its least
// number. As in Int8KV, queries and weights are int16 and sums int32.
//
// A number of a row is scale * code + zero, with code from 0 to 15. So a row times a query is scale * (codes times
// query) + zero * (sum of the query), and zero's part of a weighted sum of values is the same in every dimension.
#pragma once
#include "kv_format.h"
#include "quantize.h"

// A loaded vector has int32 with 8 codes each; step s uses the codes at bits 4 s and 16 + 4 s. An int32 of keys has 8
// dimensions of one token, two for each step. An int32 of values has two tokens, one in each half, so that no two
// threads that write tokens share a byte; and 4 dimensions, 16 apart, one for each step.
struct Int4KV : Int8KV {
    using Stored = uint32_t;
    static constexpr int kSteps = 4;
    static constexpr bool kZeroed = true;
    static constexpr int64_t kScaleBytes = 4 * kStripTokens * sizeof(bfloat16);
    static constexpr int64_t kKeyStride = kStripTokens;
    static constexpr int kUnitDims = 16 * kSteps;  // dimensions in a row of 16 int32 of values
    static constexpr int kUnitVectors = kUnitDims / kLanes;

    static int64_t num_units(int64_t head_dim) { return (head_dim + kUnitDims - 1) / kUnitDims; }
    static int64_t keys_size(int64_t head_dim) { return (head_dim + 7) / 8 * kStripTokens; }
    static int64_t values_size(int64_t head_dim) { return kStripTokens / kPack * value_stride(head_dim); }
    static int64_t value_stride(int64_t head_dim) { return num_units(head_dim) * 16; }

    static Stored *keys(char *strip) { return (Stored *)strip; }
    static Stored *values(char *strip, int64_t head_dim) { return keys(strip) + keys_size(head_dim); }

    static int num_value_vectors(int64_t head_dim) { return int(num_units(head_dim)) * kUnitVectors; }
    static int64_t value_offset(int vector) { return vector / kUnitVectors * 16 + first_lane(vector); }
    static int64_t first_dim(int vector) {
        return vector / kUnitVectors * kUnitDims + vector % kSteps * 16 + first_lane(vector);
    }

    static Loaded load_vector(const Stored *memory, int step) {
        typedef uint16_t halves __attribute__((vector_size(4 * kLanes)));
        return (Loaded)(load_as<halves>(memory) >> 4 * step & 15);
    }

    // A few dimensions of keys are far larger than the rest, and the scale has to reach them. After a multiplication
    // by a Hadamard matrix, in the blocks of layers/int8.py, none is. The matrix is its own inverse.
    static void change_basis(float *row, int64_t head_dim) {
        int64_t size = 1;
        while (size < kRotated && head_dim % (4 * size) == 0) size *= 4;
        rotate_row(row, head_dim, size, row);
        floats normalise = splat(1 / std::sqrt(float(size)));
        for (int64_t d = 0; d < head_dim; d += kLanes) store(row + d, load(row + d) * normalise);
    }

    // Computes the codes of a row, which has room for a multiple of 16 numbers. The scale is NaN if the row is not
    // finite.
    struct Range {
        bfloat16 scale, zero;
    };
    static Range quantize(float *row, int64_t head_dim, uint8_t *codes) {
        for (int64_t d = head_dim; d % 16; ++d) row[d] = row[0];
        floats highest = load(row), lowest = -load(row), not_finite{};
        for (int64_t d = 0; d < head_dim; d += kLanes) {
            floats x = load(row + d);
            highest = max(highest, x), lowest = max(lowest, -x);
            not_finite += x * 0.f;
        }
        float zero = to_float(from_float<bfloat16>(-max_of(lowest)));
        bfloat16 scale = from_float<bfloat16>((max_of(highest) - zero) / 15);
        floats inverse = splat(to_float(scale) > std::numeric_limits<float>::min() ? 1 / to_float(scale) : 0.f);
        for (int64_t d = 0; d < head_dim; d += kLanes) {
            ints code = nearest_ints((load(row + d) - splat(zero)) * inverse);
            code = code < 0 ? ints{} : code;
            code = code > 15 ? ints{} + 15 : code;
            typedef uint8_t Narrow __attribute__((vector_size(kLanes)));
            store_as(codes + d, __builtin_convertvector(code, Narrow));
        }
        return {from_float<bfloat16>(to_float(scale) + sum_of(not_finite)), from_float<bfloat16>(zero)};
    }

    static void store_key(char *strip, int64_t token, const uint8_t *codes, int64_t head_dim) {
        Stored *to = keys(strip) + token;
        for (int64_t d = 0; d < head_dim; d += 8, to += kKeyStride) {
            uint32_t packed = 0;
            for (int64_t i = 0; i < 8 && d + i < head_dim; ++i)
                packed |= uint32_t(codes[d + i]) << (i / 2 * 4 + i % 2 * 16);
            *to = packed;
        }
    }

    static void store_value(char *strip, int64_t token, const uint8_t *codes, int64_t head_dim) {
        Stored *row = values(strip, head_dim) + token / kPack * value_stride(head_dim);
        for (int64_t unit = 0; unit < num_units(head_dim); ++unit)
            for (int64_t lane = 0; lane < 16; ++lane) {
                uint16_t packed = 0;
                for (int64_t step = 0; step < kSteps; ++step)
                    if (int64_t d = unit * kUnitDims + step * 16 + lane; d < head_dim)
                        packed |= uint16_t(codes[d] << 4 * step);
                ((uint16_t *)(row + unit * 16 + lane))[token % kPack] = packed;
            }
    }

    static bfloat16 *key_scales(char *strip, int64_t head_dim) {
        return (bfloat16 *)(values(strip, head_dim) + values_size(head_dim));
    }
    static bfloat16 *key_zeros(char *strip, int64_t head_dim) {
        return key_scales(strip, head_dim) + kStripTokens;
    }
    static bfloat16 *value_scales(char *strip, int64_t head_dim) {
        return key_scales(strip, head_dim) + 2 * kStripTokens;
    }
    static bfloat16 *value_zeros(char *strip, int64_t head_dim) {
        return key_scales(strip, head_dim) + 3 * kStripTokens;
    }

  private:
    // The first of the 16 lanes of a unit's row.
    static int first_lane(int vector) { return vector % kUnitVectors / kSteps * kLanes; }
};

template <>
inline void write_kv<Int4KV>(char *strip, int64_t token, float *key, float *value, int64_t head_dim, bool) {
    uint8_t codes[kMaxHeadDim];
    Int4KV::change_basis(key, head_dim);
    Int4KV::change_basis(value, head_dim);
    Int4KV::Range keys = Int4KV::quantize(key, head_dim, codes);
    Int4KV::store_key(strip, token, codes, head_dim);
    Int4KV::Range values = Int4KV::quantize(value, head_dim, codes);
    Int4KV::store_value(strip, token, codes, head_dim);
    Int4KV::key_scales(strip, head_dim)[token] =
        from_float<bfloat16>(to_float(keys.scale) + 0 * to_float(values.scale));  // as in write_kv of Int8KV
    Int4KV::key_zeros(strip, head_dim)[token] = keys.zero;
    Int4KV::value_scales(strip, head_dim)[token] = values.scale;
    Int4KV::value_zeros(strip, head_dim)[token] = values.zero;
}
