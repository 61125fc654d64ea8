#include "vec_math.h"

// Fewer elements than this take less time than the barriers of a parallel region.
static constexpr int64_t kMinParallel = 1 << 13;

// out[t, i] = silu(gate_up[t, i]) * gate_up[t, size + i], rounded once more in between, as torch does.
template <typename T> static void silu_mul(const T *gate_up, T *out, int64_t num_tokens, int64_t size) {
#pragma omp parallel for if (num_tokens * size >= kMinParallel)
    for (int64_t t = 0; t < num_tokens; ++t) {
        const T *gate = gate_up + 2 * t * size, *up = gate + size;
        T *product = out + t * size;
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) {
            float x = to_float(gate[i]);
            float silu = to_float(from_float<T>(x / (1 + exp_approx(-x))));
            product[i] = from_float<T>(silu * to_float(up[i]));
        }
    }
}

EXPORT void ingine_silu_mul(const void *gate_up, void *out, int64_t num_tokens, int64_t size, int32_t dtype) {
    if (dtype == kFloat32)
        silu_mul((const float *)gate_up, (float *)out, num_tokens, size);
    else
        silu_mul((const bfloat16 *)gate_up, (bfloat16 *)out, num_tokens, size);
}
