// The layout of keys and values in memory, and their products.
//
// The unit is the strip: up to 16 consecutive tokens of one KV head, in one piece of memory. Keys are
// [head_dim / pack, 16, pack] and values [16 / pack, width, pack], where width is head_dim rounded up to 16, and
// pack is the number of neighbours that one instruction multiplies and adds. So a vector of keys is one pair of
// dimensions of 16 tokens, a vector of values is one pair of tokens in 16 dimensions, and both products are the same
// loop: a pair of a row, broadcast, times a vector is added to a vector of sums.
#pragma once
#include <limits>

#include "simd.h"

constexpr int kStripTokens = 16;
constexpr int kMaxHeadDim = 256;

inline int64_t padded_width(int64_t head_dim) { return (head_dim + 15) / 16 * 16; }

// StoredT is the type of a stored number, RowT that of its factor (query or weight), and SumT a vector of sums.
template <typename StoredT, typename RowT, typename SumT, int kPackedNumbers> struct KVFormat {
    using Stored = StoredT;
    using Row = RowT;
    using Sum = SumT;
    static constexpr int kPack = kPackedNumbers;
    static constexpr int kSteps = 1;  // number of vectors to multiply in one loaded vector
    static constexpr int64_t kKeyStride = kStripTokens * kPack;
    static constexpr bool kScaled = false, kZeroed = false;
    static constexpr int64_t kScaleBytes = 0;  // scales of a strip

    static int64_t keys_size(int64_t head_dim) { return kStripTokens * head_dim; }
    static int64_t values_size(int64_t head_dim) { return kStripTokens * padded_width(head_dim); }
    static int64_t value_stride(int64_t head_dim) { return padded_width(head_dim) * kPack; }

    static Stored *keys(char *strip) { return (Stored *)strip; }
    static Stored *values(char *strip, int64_t head_dim) { return keys(strip) + keys_size(head_dim); }

    // For the vectors of values of kPack tokens: their number, and the offset and first dimension of each.
    static int num_value_vectors(int64_t head_dim) { return int(padded_width(head_dim) / kLanes); }
    static int64_t value_offset(int vector) { return int64_t(vector) * kLanes * kPack; }
    static int64_t first_dim(int vector) { return int64_t(vector) * kLanes; }

    // Keys and values may be stored in another basis. Queries are converted to it, and outputs from it.
    static void change_basis(float *, int64_t) {}

    static void store_key(char *strip, int64_t token, const Stored *row, int64_t head_dim) {
        Stored *to = keys(strip) + token * kPack;
        for (int64_t d = 0; d < head_dim; d += kPack)
            std::memcpy(to + d * kStripTokens, row + d, kPack * sizeof(Stored));
    }

    // If the last token of a pair is not written, 0 is stored there: weight 0 times a number of free memory is not
    // always 0. Every step writes its sequences' last tokens, so the 0 holds for later steps too.
    static void store_value(char *strip, int64_t token, const Stored *row, int64_t head_dim, bool zero_next) {
        Stored *to = values(strip, head_dim) + token / kPack * value_stride(head_dim) + token % kPack;
        for (int64_t d = 0; d < head_dim; ++d) to[d * kPack] = row[d];
        if (zero_next && token % kPack + 1 < kPack)
            for (int64_t d = 0; d < head_dim; ++d) to[d * kPack + 1] = Stored{};
    }
};

template <typename Format> inline int64_t strip_bytes(int64_t head_dim) {
    int64_t size = Format::keys_size(head_dim) + Format::values_size(head_dim);
    return size * sizeof(typename Format::Stored) + Format::kScaleBytes;
}

struct Float32KV : KVFormat<float, float, floats, 1> {
    using Loaded = floats;
    static Loaded load_vector(const Stored *memory, int) { return load(memory); }
    static Loaded broadcast(const Row *row) { return splat(*row); }
    static Sum dot(Sum sum, Loaded row, Loaded vector) { return fma(row, vector, sum); }
    static floats to_floats(Sum sum) { return sum; }

    static float pack(const float *row, int64_t size, float *packed) {
        std::memcpy(packed, row, size * sizeof(float));
        return 1;
    }
};

struct BFloat16KV : KVFormat<bfloat16, bfloat16, floats, 2> {
#if defined(__AVX512BF16__)
    using Loaded = ints;
    static Loaded load_vector(const Stored *memory, int) { return load_as<ints>(memory); }
    static Loaded broadcast(const Row *row) { return splat(load_as<int32_t>(row)); }
    static Sum dot(Sum sum, Loaded row, Loaded vector) {
        return _mm512_dpbf16_ps(sum, (__m512bh)row, (__m512bh)vector);
    }
#else
    struct Loaded {
        floats even, odd;
    };
    static Loaded load_vector(const Stored *memory, int) {
        uints pairs = load_as<uints>(memory);
        return {(floats)(pairs << 16), (floats)(pairs & 0xffff0000)};
    }
    static Loaded broadcast(const Row *row) { return {splat(to_float(row[0])), splat(to_float(row[1]))}; }
    static Sum dot(Sum sum, Loaded row, Loaded vector) {
        return fma(row.odd, vector.odd, fma(row.even, vector.even, sum));
    }
#endif
    static floats to_floats(Sum sum) { return sum; }

    static float pack(const float *row, int64_t size, bfloat16 *packed) {
        for (int64_t i = 0; i < size; i += kLanes) store(packed + i, load(row + i));
        return 1;
    }
};

// Keys and values are int8 times a float of their token and head; queries and weights are int16 times a float of
// their row, so that only the rounding to int8 loses precision.
// No sum overflows: 256 dimensions, or tokens of a segment, times 127 * 32767 is less than 2^31.
struct Int8KV : KVFormat<int8_t, int16_t, ints, 2> {
    static constexpr bool kScaled = true;
    static constexpr int64_t kScaleBytes = 2 * kStripTokens * sizeof(float);

    typedef int8_t chars __attribute__((vector_size(2 * kLanes)));
    typedef int16_t pairs __attribute__((vector_size(4 * kLanes)));

    using Loaded = pairs;
    static Loaded load_vector(const Stored *memory, int) {
        return __builtin_convertvector(load_as<chars>(memory), pairs);
    }
    static Loaded broadcast(const Row *row) { return (pairs)splat(load_as<int32_t>(row)); }
    static Sum dot(Sum sum, Loaded row, Loaded vector) {
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
        return (ints)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)row, (__m512i)vector);
#elif defined(__AVX512F__) && defined(__AVX512BW__)
        return sum + (ints)_mm512_madd_epi16((__m512i)row, (__m512i)vector);
#elif defined(__AVX2__) && defined(__FMA__)
        return sum + (ints)_mm256_madd_epi16((__m256i)row, (__m256i)vector);
#else
        ints a = (ints)row, b = (ints)vector;
        return sum + (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
    }
    static floats to_floats(Sum sum) { return __builtin_convertvector(sum, floats); }

    // Returns the scale. For a row that is not finite it is NaN, and the packed numbers are arbitrary.
    template <typename To> static float pack(const float *row, int64_t size, To *packed) {
        floats highest{}, not_finite{};
        for (int64_t i = 0; i < size; i += kLanes) {
            floats x = load(row + i);
            highest = max(highest, abs(x));
            not_finite += x * 0.f;
        }
        float scale = max_of(highest) / std::numeric_limits<To>::max();
        floats inverse = splat(scale > 0 ? 1 / scale : 0.f);
        for (int64_t i = 0; i < size; i += kLanes) {
            typedef To Narrow __attribute__((vector_size(kLanes * sizeof(To))));
            ints whole = round_to_ints(load(row + i) * inverse);
            store_as(packed + i, __builtin_convertvector(whole, Narrow));
        }
        return scale + sum_of(not_finite);
    }

    static float *key_scales(char *strip, int64_t head_dim) {
        return (float *)(values(strip, head_dim) + values_size(head_dim));
    }
    static float *value_scales(char *strip, int64_t head_dim) {
        return key_scales(strip, head_dim) + kStripTokens;
    }
};

// Writes the key and value of one token, which are padded with zeros to a multiple of 16.
template <typename Format>
inline void write_kv(char *strip, int64_t token, float *key, float *value, int64_t head_dim, bool zero_next) {
    typename Format::Stored packed[kMaxHeadDim];
    int64_t size = padded_width(head_dim);
    float key_scale = Format::pack(key, size, packed);
    Format::store_key(strip, token, packed, head_dim);
    float value_scale = Format::pack(value, size, packed);
    Format::store_value(strip, token, packed, head_dim, zero_next);
    if constexpr (Format::kScaled) {
        // A value that is not finite makes the key's scale NaN too: a weight of NaN would be lost in an int16.
        Format::key_scales(strip, head_dim)[token] = key_scale + 0 * value_scale;
        Format::value_scales(strip, head_dim)[token] = value_scale;
    }
}
