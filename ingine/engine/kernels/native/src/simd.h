// Vectors of numbers as wide as the machine's registers. They use GCC's vector extensions, for any CPU (clang has no
// __builtin_shuffle), and intrinsics for the few operations that the extensions do not express.
#pragma once
#include "vec.h"

#if defined(__AVX512F__) && defined(__AVX512BW__)
constexpr int kLanes = 16;
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t uints __attribute__((vector_size(4 * kLanes)));
typedef int16_t shorts __attribute__((vector_size(2 * kLanes)));
typedef uint16_t ushorts __attribute__((vector_size(2 * kLanes)));

template <typename Vector> inline Vector load_as(const void *memory) {
    Vector vector;
    std::memcpy(&vector, memory, sizeof vector);
    return vector;
}

template <typename Vector> inline void store_as(void *memory, Vector vector) {
    std::memcpy(memory, &vector, sizeof vector);
}

inline floats splat(float x) { return x - floats{}; }
inline ints splat(int32_t x) { return x - ints{}; }

inline floats load(const float *memory) { return load_as<floats>(memory); }

inline floats load(const bfloat16 *memory) {
    return (floats)(__builtin_convertvector(load_as<ushorts>(memory), uints) << 16);
}

inline void store(float *memory, floats x) { store_as(memory, x); }

// Rounds as from_float does.
inline void store(bfloat16 *memory, floats x) {
#if defined(__AVX512BF16__)
    store_as(memory, (__m256i)_mm512_cvtneps_pbh(x));
#else
    uints bits = (uints)x;
    bits = x == x ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : uints{} + 0x7fc0;
    store_as(memory, __builtin_convertvector(bits, ushorts));
#endif
}

// Loads the first `count` numbers, if that is less than a vector; the rest of the vector is 0.
template <typename T> inline floats load(const T *memory, int64_t count) {
    if (count >= kLanes) return load(memory);
    T padded[kLanes] = {};
    std::memcpy(padded, memory, count * sizeof(T));
    return load(padded);
}

template <typename T> inline void store(T *memory, floats x, int64_t count) {
    if (count >= kLanes) return store(memory, x);
    T padded[kLanes];
    store(padded, x);
    std::memcpy(memory, padded, count * sizeof(T));
}

template <typename T> inline floats rounded(floats x) {
    T narrow[kLanes];
    store(narrow, x);
    return load(narrow);
}

template <> inline floats rounded<float>(floats x) { return x; }

inline floats fma(floats a, floats b, floats c) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__) && defined(__FMA__)
    return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
    return vfmaq_f32(c, a, b);
#else
    return a * b + c;
#endif
}

// Returns `b` where either is NaN.
inline floats max(floats a, floats b) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
    return _mm512_maskz_max_ps(-1, a, b);  // g++ 12 warns of an undefined vector in _mm512_max_ps
#elif defined(__AVX2__) && defined(__FMA__)
    return _mm256_max_ps(a, b);
#else
    return a > b ? a : b;
#endif
}

inline floats abs(floats x) { return (floats)((uints)x & 0x7fffffff); }

// Rounds to nearest; only for |x| < 2^22.
inline ints round_to_ints(floats x) {
    constexpr float kRound = 12582912.f;  // 1.5 * 2^23: the last bits of the sum are the integer
    return (ints)(x + kRound) - 0x4b400000;
}

// The same as round_to_ints, for a product: there g++ may fuse product and sum, which then round once, not twice.
inline ints nearest_ints(floats x) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
    return (ints)_mm512_maskz_cvtps_epi32(-1, x);  // as in max
#elif defined(__AVX2__) && defined(__FMA__)
    return (ints)_mm256_cvtps_epi32(x);
#elif defined(__SSE2__)
    return (ints)_mm_cvtps_epi32(x);
#elif defined(__aarch64__)
    return (ints)vcvtnq_s32_f32(x);
#else
    return round_to_ints(x);
#endif
}

// Returns 2^x for x <= 0, within one unit of the last place; 0 below float's normal range, NaN for NaN.
// Coefficients: S. Moshier, Cephes library, exp2f.
inline floats exp2_of_negative(floats x) {
    x = max(splat(-127.f), x);
    ints whole = round_to_ints(x);
    floats f = x - __builtin_convertvector(whole, floats);
    floats p = fma(splat(1.535336188319500e-4f), f, splat(1.339887440266574e-3f));
    p = fma(p, f, splat(9.618437357674640e-3f));
    p = fma(p, f, splat(5.550332471162809e-2f));
    p = fma(p, f, splat(2.402264791363012e-1f));
    p = fma(p, f, splat(6.931472028550421e-1f));
    p = fma(p, f, splat(1.f));
    return p * (floats)((whole + 127) << 23);
}

// 0, 1, 2 ...
inline ints lane_numbers() {
    ints lanes{};
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = lane;
    return lanes;
}

// Reduces a vector by combining its halves repeatedly.
template <typename Fold> inline float fold(floats x, Fold combine) {
    for (int step = kLanes / 2; step; step /= 2)
        x = combine(x, __builtin_shuffle(x, lane_numbers() ^ step));
    return x[0];
}

inline float sum_of(floats x) {
    return fold(x, [](floats a, floats b) { return a + b; });
}

inline float max_of(floats x) {
    return fold(x, [](floats a, floats b) { return max(a, b); });
}
