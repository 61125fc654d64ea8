// Products of ingine/engine/kernels/native/src/linear.cpp beside textbook ones, for CPUs that only an emulator has here: no torch
// and no Python. Prints the instructions of each format; the first wrong product is one line, and status 1.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "vec.h"

extern "C" {
const char *ingine_linear_isa(int64_t);
void ingine_linear(int32_t, const void *, const char *, const float *, void *, int64_t, int64_t, int64_t);
void ingine_linear_int8(int32_t, const void *, const char *, const float *, const int32_t *, const float *, void *,
                        int64_t, int64_t, int64_t, int64_t);
void ingine_linear_pack(const char *, int64_t, int64_t, int64_t, char *);
void ingine_linear_gather(const char *, const int64_t *, int64_t, int64_t, int64_t, char *);
}

namespace {

constexpr int64_t kMostRows = 32, kPanel = 32;
const int64_t kRowCounts[] = {1, 2, 3, 6, 7, 13, 32};
const int64_t kShapes[][2] = {{1, 4}, {7, 8}, {33, 64}, {96, 576}, {40, 4500}};  // n, k

[[noreturn]] void fail(const char *what, int64_t rows, int64_t n, int64_t k) {
    std::printf("wrong: %s, rows %d, n %d, k %d\n", what, int(rows), int(n), int(k));
    std::exit(1);
}

int64_t padded(int64_t n) { return (n + kPanel - 1) / kPanel * kPanel; }

// Numbers of at most 8 bits, so that bfloat16 has them and rotating them rounds nothing.
int next_integer() {
    static uint32_t state = 1;
    state = state * 1664525 + 1013904223;
    return int(state >> 24) - 127;
}

template <typename T> std::vector<T> numbers(int64_t count) {
    std::vector<T> made(count);
    for (T &x : made) x = from_float<T>(next_integer() / 64.f);
    return made;
}

template <typename T> std::vector<char> pack(const std::vector<T> &w, int64_t n, int64_t k) {
    std::vector<char> panels(padded(n) * k * sizeof(T));
    ingine_linear_pack((const char *)w.data(), n, k, sizeof(T), panels.data());
    return panels;
}

template <typename T> bool near(T ours, double exact, double scale) {
    const double rounding = sizeof(T) == 2 ? 1. / 256 : 1e-5;
    return std::fabs(to_float(ours) - exact) <= rounding * std::fabs(exact) + 1e-5 * scale;
}

// `multiply(rows, out)` for each number of rows, beside `exact` [kMostRows, n]; all with the same bits.
template <typename T, class Multiply>
void check(const char *what, int64_t n, int64_t k, const std::vector<double> &exact, Multiply multiply) {
    std::vector<T> whole(kMostRows * n), out(kMostRows * n);
    multiply(kMostRows, whole.data());
    for (int64_t i = 0; i < kMostRows * n; i++)
        if (!near(whole[i], exact[i], std::sqrt(double(k)))) fail(what, kMostRows, n, k);
    for (int64_t rows : kRowCounts) {
        multiply(rows, out.data());
        if (std::memcmp(out.data(), whole.data(), rows * n * sizeof(T))) fail("not the same bits", rows, n, k);
    }
}

template <typename T> void check_float(const char *what, DType dtype, int64_t n, int64_t k) {
    const std::vector<T> x = numbers<T>(kMostRows * k), w = numbers<T>(n * k);
    const std::vector<float> bias = numbers<float>(padded(n));
    const std::vector<char> panels = pack(w, n, k);
    std::vector<double> exact(kMostRows * n);
    for (int64_t r = 0; r < kMostRows; r++)
        for (int64_t c = 0; c < n; c++) {
            double sum = bias[c];
            for (int64_t i = 0; i < k; i++) sum += double(to_float(x[r * k + i])) * to_float(w[c * k + i]);
            exact[r * n + c] = sum;
        }
    check<T>(what, n, k, exact, [&](int64_t rows, T *out) {
        ingine_linear(dtype, x.data(), panels.data(), bias.data(), out, rows, n, k);
    });
    const int64_t last = n - 1;
    std::vector<T> row(k);
    ingine_linear_gather(panels.data(), &last, 1, k, sizeof(T), (char *)row.data());
    if (std::memcmp(row.data(), &w[last * k], k * sizeof(T))) fail("a gathered row", 1, n, k);
}

// A row times a Hadamard matrix, and rounded to 127 steps of its largest number; returns the step.
template <typename T> double quantized(const T *x, int64_t k, int64_t rotation, std::vector<double> &out) {
    float largest = 0;
    for (int64_t i = 0; i < k; i++) {
        out[i] = 0;
        for (int64_t j = 0; j < rotation; j++) {
            const bool minus = __builtin_popcount(unsigned(i % rotation & j)) % 2;
            out[i] += (minus ? -1 : 1) * to_float(x[i / rotation * rotation + j]);
        }
        largest = std::fmax(largest, float(std::fabs(out[i])));
    }
    const float inverse = 127.f / largest;
    for (int64_t i = 0; i < k; i++) {
        volatile float scaled = float(out[i]) * inverse;  // rounded to float before it is to an integer
        out[i] = std::nearbyint(scaled);
    }
    return largest / 127 / std::sqrt(double(rotation));
}

template <typename T> void check_int8(const char *what, DType dtype, int64_t n, int64_t k) {
    const int64_t rotation = k % 64 == 0 ? 64 : k % 16 == 0 ? 16 : 4;
    const std::vector<T> x = numbers<T>(kMostRows * k);
    std::vector<int8_t> w(n * k);
    for (int8_t &one : w) one = int8_t(next_integer() % 128);
    const std::vector<float> w_scale = numbers<float>(padded(n)), bias = numbers<float>(padded(n));
    std::vector<int32_t> w_sum(padded(n));
    const std::vector<char> panels = pack(w, n, k);
    std::vector<double> exact(kMostRows * n), row(k);
    for (int64_t c = 0; c < n; c++)
        for (int64_t i = 0; i < k; i++) w_sum[c] += w[c * k + i];
    for (int64_t r = 0; r < kMostRows; r++) {
        const double x_scale = quantized(&x[r * k], k, rotation, row);
        for (int64_t c = 0; c < n; c++) {
            double sum = 0;
            for (int64_t i = 0; i < k; i++) sum += row[i] * w[c * k + i];
            exact[r * n + c] = sum * x_scale * w_scale[c] + bias[c];
        }
    }
    check<T>(what, n, k, exact, [&](int64_t rows, T *out) {
        ingine_linear_int8(dtype, x.data(), panels.data(), w_scale.data(), w_sum.data(), bias.data(), out, rows, n,
                           k, rotation);
    });
}

}  // namespace

int main() {
    for (auto [n, k] : kShapes) {
        check_float<float>("float32", kFloat32, n, k);
        check_float<bfloat16>("bfloat16", kBFloat16, n, k);
        check_int8<float>("int8, float32", kFloat32, n, k);
        check_int8<bfloat16>("int8, bfloat16", kBFloat16, n, k);
    }
    for (int size : {4, 2, 1}) std::printf("%s\n", ingine_linear_isa(size));
}
