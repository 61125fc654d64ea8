// Rotary position embedding of one row, as in ingine/engine/kernels/layers/rotary.py.
#pragma once
#include "simd.h"

// out = x, rotated by the token's cos and sin unless these are null; padded with zeros to a multiple of 16.
// Rounded where torch rounds: after x * cos, and at the end.
template <typename T>
inline void rotate_row(const T *x, const T *cos, const T *sin, int64_t head_dim, float *out) {
    for (int64_t d = head_dim; d % 16; ++d) out[d] = 0;
    if (cos == nullptr) {
        for (int64_t d = 0; d < head_dim; d += kLanes) store(out + d, load(x + d, head_dim - d), head_dim - d);
        return;
    }
    int64_t half = head_dim / 2;
    for (int64_t d = 0; d < half; d += kLanes) {
        int64_t count = half - d;
        floats low = load(x + d, count), high = load(x + half + d, count);
        floats cos_low = load(cos + d, count), cos_high = load(cos + half + d, count);
        floats sin_low = load(sin + d, count), sin_high = load(sin + half + d, count);
        store(out + d, rounded<T>(rounded<T>(low * cos_low) + high * sin_low), count);
        store(out + half + d, rounded<T>(rounded<T>(high * cos_high) + low * sin_high), count);
    }
}
