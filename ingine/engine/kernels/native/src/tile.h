// The inner loop of linear.cpp: multiplies a few rows by a few vectors of columns, with the sums in registers.
#pragma once
#include <algorithm>
#include <utility>

#include "dot.h"

constexpr int kColumns = 32;  // columns of a panel
constexpr int64_t kGroupBytes = 4;
constexpr int64_t kPanelGroupBytes = kColumns * kGroupBytes;

// A tile of up to kTileRows rows has kTileVectors vectors of columns; with up to kWideRows rows it has kWideVectors,
// since each addition to a sum waits for the one before: too few sums would leave the multipliers idle.
#if defined(__AVX512F__) && defined(__AVX512BW__)
constexpr int kTileRows = 10;  // 20 sums; 24 also fit into the 32 registers, but are 5 % slower
constexpr int kTileVectors = 2, kWideRows = 0, kWideVectors = 2;
#elif defined(__aarch64__)
constexpr int kTileRows = 5;  // 20 sums in 32 registers
constexpr int kTileVectors = 4, kWideRows = 2, kWideVectors = 8;
#else
constexpr int kTileRows = 6;  // 12 sums in 16 registers
constexpr int kTileVectors = 2, kWideRows = 2, kWideVectors = 4;
#endif

// What a tile prefetches: a cache line for each `every` groups.
struct Prefetch {
    const char *from;
    int64_t every;
};

// sums[ROWS][VECTORS * kLanes] (+)= x[ROWS][groups] * w[groups][VECTORS * kLanes]; rows of sums and groups of w are
// kColumns apart. A STREAM prefetches all that it reads: a group of `ahead` for every group.
template <class Dot, int ROWS, int VECTORS, bool STREAM>
void multiply_tile(const char *x, int64_t x_stride, const char *w, int64_t groups, float *sums, bool resume,
                   Prefetch ahead) {
    using Sum = typename Dot::Sum;
    using Factor = typename Dot::Factor;
    Sum sum[ROWS][VECTORS];  // each loop over it is unrolled, otherwise it is kept in memory
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 16
        for (int v = 0; v < VECTORS; v++)
            sum[r][v] = resume ? load_as<Sum>(sums + r * kColumns + v * kLanes) : Sum{};
    for (int64_t g = 0; g < groups;) {
        for (int l = 0; l < (STREAM ? 2 : 1); l++, ahead.from += 64) __builtin_prefetch(ahead.from, 0, 2);
        for (const int64_t end = STREAM ? g + 1 : std::min(g + ahead.every, groups); g < end; g++) {
#pragma GCC unroll 16
            for (int step = 0; step < Dot::kSteps; step++) {
                if (step > 0) asm volatile("" ::: "memory");  // prevents early loads, for which no register is left
                Factor part[VECTORS];
#pragma GCC unroll 16
                for (int v = 0; v < VECTORS; v++) part[v] = Dot::part(load_as<ints>(w + v * sizeof(ints)), step);
#pragma GCC unroll 16
                for (int r = 0; r < ROWS; r++) {
                    const Factor broadcast = Dot::broadcast(x + r * x_stride + step * 4);
#pragma GCC unroll 16
                    for (int v = 0; v < VECTORS; v++) sum[r][v] = Dot::dot(sum[r][v], broadcast, part[v]);
                }
            }
            x += Dot::kSteps * 4, w += kPanelGroupBytes;
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 16
        for (int v = 0; v < VECTORS; v++) store_as(sums + r * kColumns + v * kLanes, sum[r][v]);
}

using Tile = void (*)(const char *, int64_t, const char *, int64_t, float *, bool, Prefetch);

template <class Dot, int VECTORS, bool STREAM, int... ROW>
Tile tile_of_rows(int64_t rows, std::integer_sequence<int, ROW...>) {
    static constexpr Tile tiles[] = {multiply_tile<Dot, ROW + 1, VECTORS, STREAM>...};
    return tiles[rows - 1];
}

// Returns the tile for `rows` and `vectors`, as multiply_block asks for. A STREAM has all of a panel's columns.
template <class Dot> Tile tile_of(int64_t rows, int64_t vectors, bool stream) {
    constexpr std::make_integer_sequence<int, kTileRows> up_to_tile{};
    if constexpr (kWideRows > 0)
        if (vectors == kWideVectors)
            return tile_of_rows<Dot, kWideVectors, false>(rows, std::make_integer_sequence<int, kWideRows>{});
    if constexpr (kTileVectors * kLanes == kColumns)
        if (stream) return tile_of_rows<Dot, kTileVectors, true>(rows, up_to_tile);
    return tile_of_rows<Dot, kTileVectors, false>(rows, up_to_tile);
}
