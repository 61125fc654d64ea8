// Products with the weights of linear layers, out = X W^T + bias, on CPUs with AVX-512 BF16 and VNNI.
//
// bfloat16 and int8 are one algorithm: 4 bytes of a row (2 bfloat16 or 4 int8: a "group") are broadcast and
// multiplied into 16 columns by one instruction. W is packed once into panels of 32 columns,
// [n / 32][groups][32 columns][4 bytes], so that a panel is one stream of memory. Each thread owns a range of
// panels; it multiplies a panel with all rows, tile by tile, and prefetches the next one meanwhile, so that
// reading and computing overlap.
//
// Every output is one accumulator that takes k in ascending order, whatever the number of rows or threads:
// a row's result does not depend on the batch that it is in.
#include "vec.h"

EXPORT int32_t ingine_linear_is_supported() {
#if defined(__AVX512BF16__) && defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
    return 1;
#else
    return 0;
#endif
}

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <vector>

namespace {

constexpr int kColumns = 32;     // of a panel: two registers
constexpr int kTileRows = 10;    // 20 accumulators; 24 fit in the 32 registers too, and are 5 % slower
constexpr int64_t kGroupBytes = 4;
constexpr int64_t kPanelGroupBytes = kColumns * kGroupBytes;
constexpr int64_t kBlockGroups = 1024;  // 128 KiB of a panel: with the rows it stays in L2
constexpr int64_t kBlockRows = 480;     // rows that a panel serves before the next one is read
constexpr int64_t kHardwareRows = 4;    // up to here the processor's own prefetching is the fastest
constexpr int64_t kStreamAhead = 8192;  // bytes ahead of the reader where a panel is read only once

struct Product {
    const char *w;          // packed
    const float *w_scale;   // int8: [n]; bfloat16: null
    const int32_t *w_sum;   // int8: [n], the sum of each column
    const float *x_scale;   // int8: [rows]
    const float *bias;      // [n] or null
    bfloat16 *out;          // [rows, n]
    int64_t n;
};

struct BFloat16Dot {
    using Register = __m512;
    static Register dot(Register sum, __m512i x, __m512i w) {
        return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)w);
    }
    static Register load(const float *sums) { return _mm512_load_ps(sums); }
    static void store(float *sums, Register sum) { _mm512_store_ps(sums, sum); }
};

struct Int8Dot {
    using Register = __m512i;
    static Register dot(Register sum, __m512i x, __m512i w) { return _mm512_dpbusd_epi32(sum, x, w); }
    static Register load(const float *sums) { return _mm512_load_si512(sums); }
    static void store(float *sums, Register sum) { _mm512_store_si512(sums, sum); }
};

// sums[ROWS][32] (+)= x[ROWS][groups] * w[groups][32], and LINES cache lines a group of `ahead` prefetched.
template <class Dot, int ROWS, int LINES>
void multiply_tile(const char *x, int64_t x_stride, const char *w, int64_t groups, float *sums, bool resume,
                   const char *ahead) {
    typename Dot::Register sum[ROWS][2];  // each loop over it is unrolled, or it lies in memory
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++) {
        sum[r][0] = resume ? Dot::load(sums + r * kColumns) : typename Dot::Register{};
        sum[r][1] = resume ? Dot::load(sums + r * kColumns + 16) : typename Dot::Register{};
    }
    for (int64_t g = 0; g < groups; g++) {
        for (int l = 0; l < LINES; l++) _mm_prefetch(ahead + l * 64, _MM_HINT_T1);
        const __m512i w0 = _mm512_load_si512(w), w1 = _mm512_load_si512(w + 64);
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; r++) {
            int32_t group;
            std::memcpy(&group, x + r * x_stride, sizeof group);
            const __m512i broadcast = _mm512_set1_epi32(group);
            sum[r][0] = Dot::dot(sum[r][0], broadcast, w0);
            sum[r][1] = Dot::dot(sum[r][1], broadcast, w1);
        }
        x += kGroupBytes, w += kPanelGroupBytes, ahead += LINES * 64;
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++) {
        Dot::store(sums + r * kColumns, sum[r][0]);
        Dot::store(sums + r * kColumns + 16, sum[r][1]);
    }
}

using Tile = void (*)(const char *, int64_t, const char *, int64_t, float *, bool, const char *);

template <class Dot, int LINES> Tile tile_of(int64_t rows) {
    static constexpr Tile tiles[kTileRows + 1] = {
        nullptr,
        multiply_tile<Dot, 1, LINES>,  multiply_tile<Dot, 2, LINES>,  multiply_tile<Dot, 3, LINES>,
        multiply_tile<Dot, 4, LINES>,  multiply_tile<Dot, 5, LINES>,  multiply_tile<Dot, 6, LINES>,
        multiply_tile<Dot, 7, LINES>,  multiply_tile<Dot, 8, LINES>,  multiply_tile<Dot, 9, LINES>,
        multiply_tile<Dot, 10, LINES>};
    return tiles[rows];
}

// The t-th of `tiles` prefetches: one alone its own panel, far ahead of the reader; of several the first two
// half of the next panel each, the rest nothing.
template <class Dot> Tile choose_tile(int64_t rows, int64_t t, int64_t tiles) {
    if (tiles == 1) return rows <= kHardwareRows ? tile_of<Dot, 0>(rows) : tile_of<Dot, 2>(rows);
    return t < 2 ? tile_of<Dot, 1>(rows) : tile_of<Dot, 0>(rows);
}

// The first `count` of 16 lanes.
inline __mmask16 lanes(int64_t count) { return count >= 16 ? 0xffff : count > 0 ? (1u << count) - 1 : 0; }

// 16 columns of a row, from column n on: their accumulators as float, scaled (int8), with the bias.
void write(const Product &p, const float *sums, int64_t row, int64_t n) {
    if (n >= p.n) return;  // columns that pad the last panel
    const __mmask16 mask = lanes(p.n - n);
    __m512 v;
    if (p.w_scale) {  // x was stored with 128 added, which added 128 times the sum of the weights
        const __m512i shift = _mm512_slli_epi32(_mm512_maskz_loadu_epi32(mask, p.w_sum + n), 7);
        v = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_load_si512(sums), shift));
        v = _mm512_mul_ps(v, _mm512_maskz_loadu_ps(mask, p.w_scale + n));
        v = _mm512_mul_ps(v, _mm512_set1_ps(p.x_scale[row]));
    } else {
        v = _mm512_load_ps(sums);
    }
    if (p.bias) v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(mask, p.bias + n));
    _mm256_mask_storeu_epi16(p.out + row * p.n + n, mask, (__m256i)_mm512_cvtneps_pbh(v));
}

// Panels [first, last) times `rows` rows from first_row on, in tiles of nearly one size.
template <class Dot>
void multiply_panels(const Product &p, const char *x, int64_t x_stride, int64_t first, int64_t last,
                     int64_t first_row, int64_t rows, float *sums) {
    const int64_t groups = x_stride / kGroupBytes, tiles = (rows + kTileRows - 1) / kTileRows;
    for (int64_t panel = first; panel < last; panel++) {
        for (int64_t g = 0; g < groups; g += kBlockGroups) {
            const int64_t count = std::min(kBlockGroups, groups - g);
            const char *w = p.w + (panel * groups + g) * kPanelGroupBytes;
            const char *ahead = tiles == 1 ? w + kStreamAhead : w + count * kPanelGroupBytes;
            for (int64_t t = 0, row = 0; t < tiles; t++) {
                const int64_t size = rows / tiles + (t < rows % tiles);
                const Tile tile = choose_tile<Dot>(size, t, tiles);
                float *tile_sums = sums + row * kColumns;
                tile(x + (first_row + row) * x_stride + g * kGroupBytes, x_stride, w, count, tile_sums, g > 0,
                     ahead + t * count * 64);
                row += size;
            }
        }
        for (int64_t row = 0; row < rows; row++) {
            write(p, sums + row * kColumns, first_row + row, panel * kColumns);
            write(p, sums + row * kColumns + 16, first_row + row, panel * kColumns + 16);
        }
    }
}

// The calling thread's share of the panels, times all rows.
template <class Dot> void multiply(const Product &p, const void *x, int64_t rows, int64_t x_stride) {
    alignas(64) static thread_local float sums[kBlockRows * kColumns];
    const int64_t thread = omp_get_thread_num(), num_threads = omp_get_num_threads();
    const int64_t panels = (p.n + kColumns - 1) / kColumns;
    const int64_t first = panels * thread / num_threads, last = panels * (thread + 1) / num_threads;
    for (int64_t row = 0; row < rows; row += kBlockRows)
        multiply_panels<Dot>(p, (const char *)x, x_stride, first, last, row,
                             std::min(kBlockRows, rows - row), sums);
}

// A row's numbers, each `size` of them (1, 4, 16 or 64) multiplied with a Hadamard matrix that is not scaled,
// so that none sticks out; the rows of W are rotated likewise (ingine/layers/int8.py). Here 16 of them:
__m512 rotate_16(__m512 x, int64_t size) {
    const auto butterfly = [](__m512 x, __m512 swapped, __mmask16 upper) {
        const __m512 sign = _mm512_mask_blend_ps(upper, _mm512_set1_ps(1), _mm512_set1_ps(-1));
        return _mm512_fmadd_ps(x, sign, swapped);
    };
    if (size >= 4) {
        x = butterfly(x, _mm512_permute_ps(x, 0b10110001), 0b1010101010101010);
        x = butterfly(x, _mm512_permute_ps(x, 0b01001110), 0b1100110011001100);
    }
    if (size >= 16) {
        x = butterfly(x, _mm512_shuffle_f32x4(x, x, 0b10110001), 0b1111000011110000);
        x = butterfly(x, _mm512_shuffle_f32x4(x, x, 0b01001110), 0b1111111100000000);
    }
    return x;
}

// Returns the largest magnitude of what it writes: NaN or infinite if a number of x is.
float rotate_row(const bfloat16 *x, int64_t k, int64_t size, float *out) {
    __m512i top = _mm512_setzero_si512();  // without its sign a float orders as an integer, a NaN above all
    for (int64_t i = 0; i < k; i += 64) {
        __m512 v[4];
        for (int r = 0; r < 4; r++) {
            const int64_t at = i + r * 16;
            const __m256i bits = _mm256_maskz_loadu_epi16(lanes(k - at), x + at);
            v[r] = rotate_16(_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16)), size);
        }
        if (size == 64) {
            const __m512 sum = _mm512_add_ps(v[0], v[1]), difference = _mm512_sub_ps(v[0], v[1]);
            const __m512 sum2 = _mm512_add_ps(v[2], v[3]), difference2 = _mm512_sub_ps(v[2], v[3]);
            v[0] = _mm512_add_ps(sum, sum2), v[1] = _mm512_add_ps(difference, difference2);
            v[2] = _mm512_sub_ps(sum, sum2), v[3] = _mm512_sub_ps(difference, difference2);
        }
        for (int r = 0; r < 4; r++) {
            _mm512_mask_storeu_ps(out + i + r * 16, lanes(k - i - r * 16), v[r]);
            top = _mm512_max_epu32(top, _mm512_castps_si512(_mm512_abs_ps(v[r])));
        }
    }
    const uint32_t max_bits = _mm512_reduce_max_epu32(top);
    float max;
    std::memcpy(&max, &max_bits, 4);
    return max;
}

// A row, rotated, as unsigned bytes, 128 + round(127 x / max|x|), and its scale: not finite if x is not.
void quantize_row(const bfloat16 *x, int64_t k, int64_t rotation, uint8_t *out, float *scale) {
    static thread_local std::vector<float> rotated;
    rotated.resize(k);
    const float max = rotate_row(x, k, rotation, rotated.data());
    *scale = max / 127.f / std::sqrt(float(rotation));
    const __m512 inverse = _mm512_set1_ps(max > 0 ? 127.f / max : 0.f);
    for (int64_t i = 0; i < k; i += 16) {
        const __m512 scaled = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes(k - i), &rotated[i]), inverse);
        const __m512i q = _mm512_add_epi32(_mm512_cvtps_epi32(scaled), _mm512_set1_epi32(128));
        _mm_mask_storeu_epi8(out + i, lanes(k - i), _mm512_cvtepi32_epi8(q));
    }
}

}  // namespace

// x [rows, k] and out [rows, n] are bfloat16, bias is float or null, w is from ingine_linear_pack; k % 2 == 0.
EXPORT void ingine_linear_bf16(const bfloat16 *x, const char *w, const float *bias, bfloat16 *out,
                               int64_t rows, int64_t n, int64_t k) {
    const Product product{w, nullptr, nullptr, nullptr, bias, out, n};
#pragma omp parallel
    multiply<BFloat16Dot>(product, x, rows, k * 2);
}

// As ingine_linear_bf16 with int8 weights, w[i, j] * w_scale[i] each, whose rows have the sums w_sum; k % 4 == 0.
// Each row of x is rotated, `rotation` numbers at a time, and quantized on the way.
EXPORT void ingine_linear_int8(const bfloat16 *x, const char *w, const float *w_scale, const int32_t *w_sum,
                               const float *bias, bfloat16 *out, int64_t rows, int64_t n, int64_t k,
                               int64_t rotation) {
    static thread_local std::vector<uint8_t> quantized_rows;
    static thread_local std::vector<float> scale_of_rows;
    quantized_rows.resize(rows * k);
    scale_of_rows.resize(rows);
    uint8_t *quantized = quantized_rows.data();
    float *scales = scale_of_rows.data();
    const Product product{w, w_scale, w_sum, scales, bias, out, n};
#pragma omp parallel
    {
#pragma omp for
        for (int64_t row = 0; row < rows; row++)
            quantize_row(x + row * k, k, rotation, quantized + row * k, scales + row);
        multiply<Int8Dot>(product, quantized, rows, k);
    }
}

// W [n, k], `size` bytes an element (2 or 1), into panels; the last one is padded with zeros.
EXPORT void ingine_linear_pack(const char *w, int64_t n, int64_t k, int64_t size, char *packed) {
    const int64_t groups = k * size / kGroupBytes, padded = (n + kColumns - 1) / kColumns * kColumns;
#pragma omp parallel for
    for (int64_t column = 0; column < padded; column++)
        for (int64_t g = 0; g < groups; g++) {
            char *to = packed + ((column / kColumns * groups + g) * kColumns + column % kColumns) * kGroupBytes;
            if (column < n)
                std::memcpy(to, w + (column * groups + g) * kGroupBytes, kGroupBytes);
            else
                std::memset(to, 0, kGroupBytes);
        }
}

// out[i] = W[ids[i]] out of the panels, `size` bytes an element: the embedding of a tied vocabulary matrix.
EXPORT void ingine_linear_gather(const char *packed, const int64_t *ids, int64_t count, int64_t k,
                                 int64_t size, char *out) {
    const int64_t groups = k * size / kGroupBytes;
#pragma omp parallel for if (count > 8)
    for (int64_t i = 0; i < count; i++)
        for (int64_t g = 0; g < groups; g++)
            std::memcpy(out + (i * groups + g) * kGroupBytes,
                        packed + ((ids[i] / kColumns * groups + g) * kColumns + ids[i] % kColumns) * kGroupBytes,
                        kGroupBytes);
}

#endif
