#include "vec.h"

#include <cmath>

// Fewer elements than this take less time than the barriers of a parallel region.
static constexpr int64_t kMinParallel = 1 << 14;

// out = row / sqrt(mean(row^2) + eps) * weight, from the sum of the squares, rounded once, as torch does.
template <typename T>
static inline void scale_row(const T *row, float sum, const T *weight, T *out, int64_t size, float eps) {
    float scale = 1 / std::sqrt(sum / size + eps);
#pragma omp simd
    for (int64_t i = 0; i < size; ++i)
        out[i] = from_float<T>(to_float(row[i]) * scale * to_float(weight[i]));
}

// x [num_tokens, num_heads, size] with a stride for each of the first two; out is contiguous.
template <typename T>
static void rms_norm(const T *x, const T *weight, T *out, int64_t num_tokens, int64_t token_stride,
                     int64_t num_heads, int64_t head_stride, int64_t size, float eps) {
    int64_t num_rows = num_tokens * num_heads;
#pragma omp parallel for if (num_rows * size >= kMinParallel)
    for (int64_t row = 0; row < num_rows; ++row) {
        const T *in = x + row / num_heads * token_stride + row % num_heads * head_stride;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < size; ++i) sum += to_float(in[i]) * to_float(in[i]);
        scale_row(in, sum, weight, out + row * size, size, eps);
    }
}

template <typename T>
static void add_rms_norm(T *residual, const T *x, const T *weight, T *out, int64_t num_tokens, int64_t size,
                         float eps) {
#pragma omp parallel for if (num_tokens * size >= kMinParallel)
    for (int64_t t = 0; t < num_tokens; ++t) {
        T *sums = residual + t * size;
        const T *added = x + t * size;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < size; ++i) {
            sums[i] = from_float<T>(to_float(sums[i]) + to_float(added[i]));
            sum += to_float(sums[i]) * to_float(sums[i]);
        }
        scale_row(sums, sum, weight, out + t * size, size, eps);
    }
}

EXPORT void ingine_rms_norm(const void *x, const void *weight, void *out, int64_t num_tokens,
                            int64_t token_stride, int64_t num_heads, int64_t head_stride, int64_t size,
                            float eps, int32_t dtype) {
    if (dtype == kFloat32)
        rms_norm((const float *)x, (const float *)weight, (float *)out, num_tokens, token_stride, num_heads,
                 head_stride, size, eps);
    else
        rms_norm((const bfloat16 *)x, (const bfloat16 *)weight, (bfloat16 *)out, num_tokens, token_stride,
                 num_heads, head_stride, size, eps);
}

EXPORT void ingine_add_rms_norm(void *residual, const void *x, const void *weight, void *out,
                                int64_t num_tokens, int64_t size, float eps, int32_t dtype) {
    if (dtype == kFloat32)
        add_rms_norm((float *)residual, (const float *)x, (const float *)weight, (float *)out, num_tokens,
                     size, eps);
    else
        add_rms_norm((bfloat16 *)residual, (const bfloat16 *)x, (const bfloat16 *)weight, (bfloat16 *)out,
                     num_tokens, size, eps);
}
