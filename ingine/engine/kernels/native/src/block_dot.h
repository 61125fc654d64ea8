// Multiplies four codes of a weight in blocks, one byte each, by four numbers of a row of x, signed bytes of at most
// 127, in kLanes columns at a time. The sums are whole numbers, the same ones with every instruction set. A
// BlockDot<bits of a code> has
//
//   kChain                 number of products that may be added before finish()
//   Chain                  a vector of such sums
//   Weights, weights(w)    a vector with four codes in each lane, prepared for add()
//   Factor, broadcast(x)   four numbers of x, in every lane
//   start(sum)             a chain that continues from `sum`, or begins at 0
//   add(chain, w, x)       the chain with a product added
//   finish(sum, chain)     the sum with the chain added, unless start() has included the sum
#pragma once
#include "dot.h"

struct BlockDotBase {
    using Chain = ints;
    using Weights = ints;
    using Factor = ints;
    static constexpr int kChain = 8;
    static Weights weights(ints w) { return w; }
    static Factor broadcast(const void *x) { return splat(load_as<int32_t>(x)); }
    static Chain start(ints sum) { return sum; }
    static ints finish(ints, Chain chain) { return chain; }
};

typedef int16_t pairs __attribute__((vector_size(4 * kLanes)));

#if (defined(__AVX512VNNI__) && defined(__AVX512BW__)) || \
    (defined(__AVXVNNI__) && defined(__FMA__) && !defined(__AVX512BW__))
constexpr int kZeroOfBytes = 128;  // added to codes of 8 bits, to make them unsigned

template <int BITS> struct BlockDot : BlockDotBase {
    static Chain add(Chain sum, Weights w, Factor x) {
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
        return (ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, (__m512i)x);
#else
        return (ints)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)w, (__m256i)x);
#endif
    }
};

#elif defined(__AVX2__) && defined(__FMA__)
constexpr int kZeroOfBytes = 0;

inline pairs multiply_pairs(ints unsigned_bytes, ints signed_bytes) {
#if defined(__AVX512BW__)
    return (pairs)_mm512_maddubs_epi16((__m512i)unsigned_bytes, (__m512i)signed_bytes);
#else
    return (pairs)_mm256_maddubs_epi16((__m256i)unsigned_bytes, (__m256i)signed_bytes);
#endif
}

// Sums of the two products of a pair of bytes, in 16 bits: kChain of them cannot overflow.
template <int BITS> struct BlockDot : BlockDotBase {
    using Chain = pairs;
    static constexpr int kChain = BITS == 4 ? 8 : BITS == 5 ? 4 : BITS == 6 ? 2 : 1;
    static_assert(((1 << BITS) - 1) * 127 * 2 * kChain <= 32767 || BITS == 8);
    static Chain start(ints) { return Chain{}; }
    static Chain add(Chain chain, Weights w, Factor x) { return chain + multiply_pairs(w, x); }
    static ints finish(ints sum, Chain chain) {
        const pairs ones = pairs{} + 1;
#if defined(__AVX512BW__)
        return sum + (ints)_mm512_madd_epi16((__m512i)chain, (__m512i)ones);
#else
        return sum + (ints)_mm256_madd_epi16((__m256i)chain, (__m256i)ones);
#endif
    }
};

// Signed codes: multiplies their magnitudes by x with the codes' signs, 2 * 128 * 127 at most.
template <> struct BlockDot<8> : BlockDot<7> {
#if defined(__AVX512BW__)
    struct Weights {
        ints magnitude;
        __mmask64 negative;
    };
    static Weights weights(ints w) {
        return {(ints)_mm512_abs_epi8((__m512i)w), _mm512_movepi8_mask((__m512i)w)};
    }
    static Chain add(Chain, Weights w, Factor x) {
        const __m512i zero = _mm512_setzero_si512();
        return multiply_pairs(w.magnitude, (ints)_mm512_mask_sub_epi8((__m512i)x, w.negative, zero, (__m512i)x));
    }
#else
    static Chain add(Chain, Weights w, Factor x) {
        return multiply_pairs((ints)_mm256_abs_epi8((__m256i)w), (ints)_mm256_sign_epi8((__m256i)x, (__m256i)w));
    }
#endif
};

#elif defined(__SSE2__)
constexpr int kZeroOfBytes = 0;

// Bytes 0 and 2, and bytes 1 and 3, expanded to 16 bits.
struct PairsOfBytes {
    pairs even, odd;
};

inline PairsOfBytes pairs_of(ints bytes) { return {(pairs)bytes << 8 >> 8, (pairs)bytes >> 8}; }

template <int BITS> struct BlockDot : BlockDotBase {
    using Weights = PairsOfBytes;
    using Factor = PairsOfBytes;
    static Weights weights(ints w) { return pairs_of(w); }
    static Factor broadcast(const void *x) { return pairs_of(splat(load_as<int32_t>(x))); }
    static Chain add(Chain sum, Weights w, Factor x) {
        return sum + (ints)_mm_madd_epi16((__m128i)w.even, (__m128i)x.even) +
               (ints)_mm_madd_epi16((__m128i)w.odd, (__m128i)x.odd);
    }
};

#elif defined(__aarch64__)
constexpr int kZeroOfBytes = 0;

template <int BITS> struct BlockDot : BlockDotBase {
    static Chain add(Chain sum, Weights w, Factor x) {
        const int8x16_t a = (int8x16_t)w, b = (int8x16_t)x;
#if defined(__ARM_FEATURE_DOTPROD)
        return (ints)vdotq_s32((int32x4_t)sum, a, b);
#else  // 2 * 128 * 127 at most fits into 16 bits
        const int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b)), high = vmull_high_s8(a, b);
        return (ints)vpadalq_s16((int32x4_t)sum, vpaddq_s16(low, high));
#endif
    }
};

#else
constexpr int kZeroOfBytes = 0;

template <int BITS> struct BlockDot : BlockDotBase {
    static Chain add(Chain sum, Weights w, Factor x) {
        for (int shift = 0; shift <= 24; shift += 8) sum += (w << shift >> 24) * (x << shift >> 24);
        return sum;
    }
};
#endif
