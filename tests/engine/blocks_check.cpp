// Products of ingine/engine/kernels/native/src/blocks.cpp beside textbook ones, for CPUs that only an emulator has here: no torch
// and no Python. The first wrong product is one line, and status 1.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "vec.h"

struct Segment {
    const char *data;
    const int64_t *order;
    int64_t rows, row_bytes, group_size;
    int32_t kind;
};

extern "C" {
void ingine_blocks(int32_t, const void *, const Segment *, int64_t, const float *, void *, int64_t, int64_t,
                   int64_t);
void ingine_blocks_gather(int32_t, const Segment *, const int64_t *, int64_t, int64_t, void *);
void ingine_blocks_pack_int4(const uint8_t *, const uint16_t *, const uint16_t *, int64_t, int64_t, int64_t, char *);
}

namespace {

constexpr int64_t kMostRows = 32, kColumns = 512, kPanel = 32;
const int64_t kRowCounts[] = {1, 2, 3, 6, 11};
constexpr int32_t kInt4 = -1;

uint8_t next_byte() {
    static uint32_t state = 1;
    state = state * 1664525 + 1013904223;
    return state >> 24;
}

double half(const uint8_t *at) {
    __fp16 number;
    std::memcpy(&number, at, 2);
    return number;
}

struct Kind {
    const char *name;
    int32_t number;
    int64_t size, bytes;
    std::vector<int> halves;  // where they are in a block
    double (*weight)(const uint8_t *block, int i);
};

int nibble(const uint8_t *bytes, int i) { return i < 16 ? bytes[i] & 15 : bytes[i - 16] >> 4; }

// The scale (or, from bit 4 on, the minimum) of a group of Q4_K and Q5_K.
int six_bits(const uint8_t *scales, int group, bool min) {
    if (group < 4) return scales[group + 4 * min] & 63;
    return (min ? scales[group + 4] >> 4 : scales[group + 4] & 15) | scales[group - 4 + 4 * min] >> 6 << 4;
}

double scaled(const uint8_t *block, int group, int code) {
    return half(block) * six_bits(block + 4, group, false) * code - half(block + 2) * six_bits(block + 4, group, true);
}

// The four bits of number i where 64 numbers are 32 bytes.
int nibble_of_64(const uint8_t *bytes, int i) { return bytes[i / 64 * 32 + i % 32] >> (i / 32 % 2 * 4) & 15; }

const Kind kKinds[] = {
    {"Q4_0", 2, 32, 18, {0}, [](const uint8_t *b, int i) { return half(b) * (nibble(b + 2, i) - 8); }},
    {"Q4_1", 3, 32, 20, {0, 2}, [](const uint8_t *b, int i) { return half(b) * nibble(b + 4, i) + half(b + 2); }},
    {"Q8_0", 8, 32, 34, {0}, [](const uint8_t *b, int i) { return half(b) * int8_t(b[2 + i]); }},
    {"Q4_K", 12, 256, 144, {0, 2},
     [](const uint8_t *b, int i) { return scaled(b, i / 32, nibble_of_64(b + 16, i)); }},
    {"Q5_K", 13, 256, 176, {0, 2},
     [](const uint8_t *b, int i) {
         return scaled(b, i / 32, nibble_of_64(b + 48, i) | (b[16 + i % 32] >> i / 32 & 1) << 4);
     }},
    {"Q6_K", 14, 256, 210, {208},
     [](const uint8_t *b, int i) {
         const int low = b[i / 128 * 64 + i % 64] >> (i / 64 % 2 * 4) & 15;
         const int high = b[128 + i / 128 * 32 + i % 32] >> (i / 32 % 4 * 2) & 3;
         return half(b + 208) * int8_t(b[192 + i / 16]) * ((low | high << 4) - 32);
     }},
};

[[noreturn]] void fail(const char *what, const char *kind, int64_t rows) {
    std::printf("wrong: %s, %s, rows %d\n", what, kind, int(rows));
    std::exit(1);
}

// Whole numbers up to 127 times a scale, for each 32.
std::vector<double> quantized(const float *x) {
    std::vector<double> out(kColumns);
    for (int64_t g = 0; g < kColumns; g += 32) {
        float largest = 0;
        for (int i = 0; i < 32; i++) largest = std::fmax(largest, std::fabs(x[g + i]));
        const float inverse = 127.f / largest;
        for (int i = 0; i < 32; i++) {
            volatile float in_steps = x[g + i] * inverse;  // rounded to float before it is to an integer
            out[g + i] = std::nearbyint(in_steps) * double(largest / 127);
        }
    }
    return out;
}

void check(const char *name, const Segment &segment, const std::vector<double> &w) {
    const int64_t n = segment.rows;
    std::vector<float> x(kMostRows * kColumns), bias(n + kPanel), whole(kMostRows * n), out(kMostRows * n);
    for (float &number : x) number = (next_byte() - 127) / 64.f;
    for (float &number : bias) number = next_byte();
    ingine_blocks(kFloat32, x.data(), &segment, 1, bias.data(), whole.data(), kMostRows, n, kColumns);
    for (int64_t r = 0; r < kMostRows; r++) {
        const std::vector<double> row = quantized(&x[r * kColumns]);
        for (int64_t c = 0; c < n; c++) {
            double sum = bias[c], magnitude = std::fabs(sum);
            for (int64_t i = 0; i < kColumns; i++) {
                sum += row[i] * w[c * kColumns + i];
                magnitude += std::fabs(row[i] * w[c * kColumns + i]);
            }
            if (!(std::fabs(whole[r * n + c] - sum) <= 2e-6 * magnitude)) fail("a product", name, r);
        }
    }
    for (int64_t rows : kRowCounts) {
        ingine_blocks(kFloat32, x.data(), &segment, 1, bias.data(), out.data(), rows, n, kColumns);
        if (std::memcmp(out.data(), whole.data(), rows * n * sizeof(float))) fail("not the same bits", name, rows);
    }
    const int64_t last = n - 1;
    std::vector<float> row(kColumns);
    ingine_blocks_gather(kFloat32, &segment, &last, 1, kColumns, row.data());
    for (int64_t i = 0; i < kColumns; i++)
        if (std::fabs(row[i] - w[last * kColumns + i]) > 1e-5 * std::fabs(row[i]) + 1e-5) fail("a row", name, 1);
}

void set_half(void *at, int i) {
    const __fp16 number = (i % 5 - 2) * 0.01f;
    std::memcpy(at, &number, 2);
}

void check_kind(const Kind &kind, int64_t n) {
    const int64_t row_bytes = kColumns / kind.size * kind.bytes;
    std::vector<uint8_t> data(n * row_bytes);
    for (uint8_t &byte : data) byte = next_byte();
    for (int64_t block = 0; block < n * kColumns / kind.size; block++)
        for (int at : kind.halves) set_half(&data[block * kind.bytes + at], block + at);
    std::vector<double> w(n * kColumns);
    for (int64_t i = 0; i < n * kColumns; i++)
        w[i] = kind.weight(&data[i / kind.size * kind.bytes], i % kind.size);
    check(kind.name, {(const char *)data.data(), nullptr, n, row_bytes, 0, kind.number}, w);
}

void check_int4(int64_t n, int64_t group_size) {
    std::vector<uint8_t> codes(n * kColumns / 2);
    std::vector<uint16_t> scales(n * kColumns / group_size), zeros(scales.size());
    for (uint8_t &byte : codes) byte = next_byte();
    for (size_t i = 0; i < scales.size(); i++) set_half(&scales[i], i), set_half(&zeros[i], i + 3);
    std::vector<double> w(n * kColumns);
    for (int64_t i = 0; i < n * kColumns; i++) {
        const uint8_t *scale = (uint8_t *)&scales[i / group_size], *zero = (uint8_t *)&zeros[i / group_size];
        w[i] = ((codes[i / 2] >> i % 2 * 4 & 15) - half(zero)) * half(scale);
    }
    const int64_t row_bytes = kColumns / 2 + 4 * kColumns / group_size;
    std::vector<char> packed((n + kPanel - 1) / kPanel * kPanel * row_bytes);
    ingine_blocks_pack_int4(codes.data(), scales.data(), zeros.data(), n, kColumns, group_size, packed.data());
    check("int4", {packed.data(), nullptr, n, row_bytes, group_size, kInt4}, w);
}

}  // namespace

int main() {
    for (int64_t n : {1, 33, 96}) {
        for (const Kind &kind : kKinds) check_kind(kind, n);
        for (int64_t group_size : {32, 128}) check_int4(n, group_size);
    }
}
