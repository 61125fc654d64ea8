// Rows of x in the form in which they multiply weights in blocks: int8, with a scale for each 32 numbers.
#pragma once
#include <algorithm>
#include <cstring>

#include "simd.h"

// The `minus` sums correct for codes to which a zero is added: the sum of the numbers times the zero, negated.
struct alignas(64) RowGroup {
    int8_t numbers[32];
    float scale;
    float scaled_sum;
    int32_t minus_8_sums, minus_128_sums;
    int32_t minus_32_sums[2];  // for 16 numbers each
};

constexpr int kGroups = 8;  // groups of a chunk

// Quantizes a row into groups: eight are contiguous, and the next eight are `stride` groups further on.
template <typename T> void quantize_groups(const T *x, int64_t k, RowGroup *row, int64_t stride) {
    typedef int8_t lane_bytes __attribute__((vector_size(kLanes)));
    for (int64_t g = 0; g < k / 32; g++) {
        const T *from = x + g * 32;
        RowGroup *out = row + g / kGroups * stride + g % kGroups;
        uints top{};  // without its sign a float is ordered as an integer; NaN is the largest
        for (int i = 0; i < 32; i += kLanes) {
            const uints bits = (uints)abs(load(from + i));
            top = bits > top ? bits : top;
        }
        uint32_t highest = 0;
        for (int lane = 0; lane < kLanes; lane++) highest = std::max<uint32_t>(highest, top[lane]);
        float max;
        std::memcpy(&max, &highest, 4);
        // If the reciprocal would be infinite, the numbers count as 0.
        const floats inverse = splat(max > 1e-36f ? 127.f / max : 0.f);
        for (int i = 0; i < 32; i += kLanes)
            store_as(out->numbers + i, __builtin_convertvector(nearest_ints(load(from + i) * inverse), lane_bytes));
        int32_t sums[2] = {};
        for (int i = 0; i < 32; i++) sums[i / 16] += out->numbers[i];
        const int32_t sum = sums[0] + sums[1];
        out->scale = max / 127.f;
        out->scaled_sum = out->scale * float(sum);
        out->minus_8_sums = -8 * sum, out->minus_128_sums = -128 * sum;
        for (int half = 0; half < 2; half++) out->minus_32_sums[half] = -32 * sums[half];
    }
}
