// The Dot of int8 (see dot.h): sums are integers, the same ones with every instruction set. In addition to what every
// Dot has,
//
//   kZero          a number that is added to stored x, since some instructions need unsigned bytes
//   store_x(x, q)  stores kLanes numbers of a row, at most 127 in magnitude, as the steps read them: kSteps bytes each
#pragma once
#include "dot.h"

struct Int8DotBase {
    using Sum = ints;
    using Factor = ints;
    static Factor broadcast(const char *x) { return splat(load_as<int32_t>(x)); }
};

typedef int8_t bytes __attribute__((vector_size(kLanes)));

#if (defined(__AVX512VNNI__) && defined(__AVX512BW__)) || \
    (defined(__AVXVNNI__) && defined(__FMA__) && !defined(__AVX512BW__))
// Multiplies four unsigned bytes of x by four signed bytes of w, without saturation.
struct Int8Dot : Int8DotBase {
    static constexpr int kSteps = 1;
    static constexpr int32_t kZero = 128;
    static Factor part(ints w, int) { return w; }
    static void store_x(char *x, ints q) { store_as(x, __builtin_convertvector(q + kZero, bytes)); }
#if defined(__AVX512VNNI__)
    static constexpr const char *kIsa = "avx512-vnni";
    static Sum dot(Sum sum, Factor x, Factor w) {
        return (ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)x, (__m512i)w);
    }
#else
    static constexpr const char *kIsa = "avx-vnni";
    static Sum dot(Sum sum, Factor x, Factor w) {
        return (ints)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)x, (__m256i)w);
    }
#endif
};

#elif defined(__SSE2__)
// Expands bytes 0 and 2 of a group, then 1 and 3, to 16 bits, in which nothing saturates.
struct Int8Dot : Int8DotBase {
    static constexpr const char *kIsa = INGINE_ISA;
    static constexpr int kSteps = 2;
    static constexpr int32_t kZero = 0;
    typedef int16_t pairs __attribute__((vector_size(4 * kLanes)));

    static Factor part(ints w, int step) { return (ints)((step == 0 ? (pairs)w << 8 : (pairs)w) >> 8); }
    static Sum dot(Sum sum, Factor x, Factor w) {
#if defined(__AVX512BW__)
        sum += (ints)_mm512_madd_epi16((__m512i)x, (__m512i)w);
#elif defined(__AVX2__) && defined(__FMA__)
        sum += (ints)_mm256_madd_epi16((__m256i)x, (__m256i)w);
#else
        sum += (ints)_mm_madd_epi16((__m128i)x, (__m128i)w);
#endif
        asm("" : "+v"(sum));  // otherwise g++ adds the products of both steps first, for which there are no registers
        return sum;
    }
    static void store_x(char *x, ints q) {
        shorts lanes = __builtin_convertvector(lane_numbers(), shorts);
        shorts order = (lanes & ~3) | ((lanes & 1) << 1) | ((lanes & 2) >> 1);
        store_as(x, __builtin_shuffle(__builtin_convertvector(q, shorts), order));
    }
};

#elif defined(__ARM_FEATURE_DOTPROD)
struct Int8Dot : Int8DotBase {
    static constexpr const char *kIsa = "neon-dotprod";
    static constexpr int kSteps = 1;
    static constexpr int32_t kZero = 0;
    static Factor part(ints w, int) { return w; }
    static Sum dot(Sum sum, Factor x, Factor w) {
        return (ints)vdotq_s32((int32x4_t)sum, (int8x16_t)x, (int8x16_t)w);
    }
    static void store_x(char *x, ints q) { store_as(x, __builtin_convertvector(q, bytes)); }
};

#elif defined(__aarch64__)
// Each step expands one byte of each group to 16 bits.
struct Int8Dot {
    using Sum = ints;
    using Factor = int16x4_t;
    static constexpr const char *kIsa = INGINE_ISA;
    static constexpr int kSteps = 4;
    static constexpr int32_t kZero = 0;
    static Factor broadcast(const char *x) { return vdup_n_s16(int16_t(load_as<int32_t>(x))); }
    static Factor part(ints w, int step) {
        int16x8_t pairs = (int16x8_t)w;
        int32x4_t wide = (int32x4_t)vshrq_n_s16(step % 2 == 0 ? vshlq_n_s16(pairs, 8) : pairs, 8);
        return step < 2 ? vmovn_s32(wide) : vshrn_n_s32(wide, 16);
    }
    static Sum dot(Sum sum, Factor x, Factor w) { return (ints)vmlal_s16((int32x4_t)sum, x, w); }
    static void store_x(char *x, ints q) { store_as(x, q); }
};

#else
// Each step multiplies one byte of each group; little-endian, as the panels are.
struct Int8Dot : Int8DotBase {
    static constexpr const char *kIsa = INGINE_ISA;
    static constexpr int kSteps = 4;
    static constexpr int32_t kZero = 0;
    static Factor part(ints w, int step) { return w << (24 - 8 * step) >> 24; }
    static Sum dot(Sum sum, Factor x, Factor w) { return sum + x * w; }
    static void store_x(char *x, ints q) { store_as(x, q); }
};
#endif
