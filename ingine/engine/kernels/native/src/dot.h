// Multiplies 4 bytes of weights (a "group": 1 float32, 2 bfloat16 or 4 int8) by as many numbers of a row of x, in
// kLanes columns at a time. A Dot has
//
//   Sum                a vector of sums, one for each column
//   Factor             a vector of numbers to multiply
//   kSteps             number of steps in which a group is multiplied, each with 4 bytes of x
//   broadcast(x)       the 4 bytes of a step, in every lane
//   part(w, step)      the numbers that a step multiplies, from a vector of groups
//   dot(sum, x, part)  the sum with the step's product added
//   kIsa               its name in the log
//
// On a CPU without arithmetic in bfloat16, one step expands the even numbers of the pairs to float32 and one step the
// odd ones: memory is read in bfloat16, and sums are those of float32. dot_int8.h has the Dots of int8.
#pragma once
#include "simd.h"

#if defined(__AVX512F__) && defined(__AVX512BW__)
#define INGINE_ISA "avx512"
#elif defined(__AVX2__) && defined(__FMA__)
#define INGINE_ISA "avx2"
#elif defined(__SSE2__)
#define INGINE_ISA "sse2"
#elif defined(__aarch64__)
#define INGINE_ISA "neon"
#else
#define INGINE_ISA "generic"
#endif

struct Float32Dot {
    using Sum = floats;
    using Factor = floats;
    static constexpr const char *kIsa = INGINE_ISA;
    static constexpr int kSteps = 1;
    static Factor broadcast(const char *x) { return splat(load_as<float>(x)); }
    static Factor part(ints w, int) { return (floats)w; }
    static Sum dot(Sum sum, Factor x, Factor w) { return fma(x, w, sum); }
};

// x is float32.
struct ExpandedBFloat16Dot : Float32Dot {
    static constexpr int kSteps = 2;
    static Factor part(ints w, int step) {
        if (step == 0) return (floats)((uints)w << 16);
#if defined(__AVX2__) && defined(__FMA__) && !defined(__AVX512BW__)
        // A mask would take a register, and a tile has none left: a sum in memory instead costs 20 %.
        return (floats)_mm256_slli_epi32(_mm256_srli_epi32((__m256i)w, 16), 16);
#else
        return (floats)((uints)w & 0xffff0000);
#endif
    }
};

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
// x is bfloat16.
struct BFloat16Dot {
    using Sum = floats;
    using Factor = ints;
    static constexpr const char *kIsa = "avx512-bf16";
    static constexpr int kSteps = 1;
    static Factor broadcast(const char *x) { return splat(load_as<int32_t>(x)); }
    static Factor part(ints w, int) { return w; }
    static Sum dot(Sum sum, Factor x, Factor w) {
        return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)w);
    }
};
#elif defined(__aarch64__) && defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
// x is bfloat16.
struct BFloat16Dot {
    using Sum = floats;
    using Factor = ints;
    static constexpr const char *kIsa = "neon-bf16";
    static constexpr int kSteps = 1;
    static Factor broadcast(const char *x) { return splat(load_as<int32_t>(x)); }
    static Factor part(ints w, int) { return w; }
    static Sum dot(Sum sum, Factor x, Factor w) {
        return (floats)vbfdotq_f32((float32x4_t)sum, (bfloat16x8_t)x, (bfloat16x8_t)w);
    }
};
#else
using BFloat16Dot = ExpandedBFloat16Dot;
#endif
