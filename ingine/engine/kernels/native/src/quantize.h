// Rotates rows of x and quantizes them to int8: ingine/engine/kernels/layers/int8.py does the same to the weights.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "simd.h"

constexpr int kRotated = 64;  // the most neighbouring numbers that a rotation mixes
constexpr int kRotatedVectors = kRotated / kLanes;

// One stage of a fast Hadamard transform: replaces two numbers STEP apart by their sum and their difference.
template <int STEP> inline void butterflies(floats (&x)[kRotatedVectors]) {
    if constexpr (STEP < kLanes) {
        const ints lanes = lane_numbers();
        for (floats &v : x) {
            const floats swapped = __builtin_shuffle(v, lanes ^ STEP);
            v = (lanes & STEP) == 0 ? swapped + v : swapped - v;
        }
    } else {
        constexpr int kApart = STEP / kLanes;
        for (int i = 0; i < kRotatedVectors; i++) {
            if (i & kApart) continue;
            const floats a = x[i], b = x[i + kApart];
            x[i] = a + b, x[i + kApart] = a - b;
        }
    }
}

// Multiplies each `size` numbers (1, 4, 16 or 64) of the row by an unscaled Hadamard matrix, which spreads outliers.
// `out` has room for a multiple of 64 numbers. Returns the largest magnitude that it writes: NaN or infinite if a
// number of x is.
template <typename T> float rotate_row(const T *x, int64_t k, int64_t size, float *out) {
    uints top{};  // without its sign a float is ordered as an integer; NaN is the largest
    for (int64_t i = 0; i < k; i += kRotated) {
        floats v[kRotatedVectors];
        for (int r = 0; r < kRotatedVectors; r++) {
            const int64_t left = std::max<int64_t>(k - i - r * kLanes, 0);
            v[r] = load(x + i + std::min<int64_t>(r * kLanes, k - i), left);
        }
        if (size >= 4) butterflies<1>(v), butterflies<2>(v);
        if (size >= 16) butterflies<4>(v), butterflies<8>(v);
        if (size >= 64) butterflies<16>(v), butterflies<32>(v);
        for (int r = 0; r < kRotatedVectors; r++) {
            store(out + i + r * kLanes, v[r]);
            const uints bits = (uints)abs(v[r]);
            top = bits > top ? bits : top;
        }
    }
    uint32_t highest = 0;
    for (int lane = 0; lane < kLanes; lane++) highest = std::max<uint32_t>(highest, top[lane]);
    float max;
    std::memcpy(&max, &highest, 4);
    return max;
}

// Rotates a row and stores round(127 x / max|x|) in the form of Dot, and its scale, which is not finite if x is not.
// `out` has room for a multiple of 64 numbers.
template <class Dot, typename T>
void quantize_row(const T *x, int64_t k, int64_t rotation, char *out, float *scale) {
    static thread_local std::vector<float> rotated;
    rotated.resize((k + kRotated - 1) / kRotated * kRotated);
    const float max = rotate_row(x, k, rotation, rotated.data());
    *scale = max / 127.f / std::sqrt(float(rotation));
    const floats inverse = splat(max > 1e-36f ? 127.f / max : 0.f);  // a smaller max would make it infinite
    for (int64_t i = 0; i < k; i += kLanes)
        Dot::store_x(out + i * Dot::kSteps, nearest_ints(load(&rotated[i]) * inverse));
}
