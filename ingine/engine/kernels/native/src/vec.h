// The types of numbers in memory (float, bfloat16) and their conversion to float, in which all is computed.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define EXPORT extern "C" __attribute__((visibility("default")))

// ingine/engine/kernels/native/__init__.py has the same numbers.
enum DType : int32_t { kFloat32 = 0, kBFloat16 = 1 };

struct bfloat16 {
    uint16_t bits;
};

inline float to_float(float x) { return x; }

inline float to_float(bfloat16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float result;
    std::memcpy(&result, &bits, 4);
    return result;
}

template <typename T> inline T from_float(float x);

template <> inline float from_float<float>(float x) { return x; }

// Rounds to nearest, ties to even, as torch does; NaN stays NaN.
template <> inline bfloat16 from_float<bfloat16>(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (x != x) return {uint16_t(0x7fc0)};
    return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
