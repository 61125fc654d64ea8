// The inner loop of linear.cpp: a few rows times a few vectors of columns, whose sums stay in registers.
#pragma once
#include <algorithm>
#include <utility>

#include "dot.h"

constexpr int kColumns = 32;  // of a panel
constexpr int64_t kGroupBytes = 4;
constexpr int64_t kPanelGroupBytes = kColumns * kGroupBytes;

// A tile of up to kTileRows rows has kTileVectors vectors of columns. Of up to kWideRows rows it has
// kWideVectors, since a sum waits for the one before: too few of them leave the multipliers idle.
#if defined(__AVX512F__) && defined(__AVX512BW__)
constexpr int kTileRows = 10;  // 20 sums; 24 fit in the 32 registers too, and are 5 % slower
constexpr int kTileVectors = 2, kWideRows = 0, kWideVectors = 2;
#elif defined(__aarch64__)
constexpr int kTileRows = 5;  // 20 sums, of 32 registers
constexpr int kTileVectors = 4, kWideRows = 2, kWideVectors = 8;
#else
constexpr int kTileRows = 6;  // 12 sums, of 16 registers
constexpr int kTileVectors = 2, kWideRows = 2, kWideVectors = 4;
#endif

// What a tile prefetches: a cache line every so many groups.
struct Prefetch {
    const char *from;
    int64_t every;
};

// sums[ROWS][VECTORS * kLanes] (+)= x[ROWS][groups] * w[groups][VECTORS * kLanes], rows of sums and groups of w
// being kColumns apart. Of `ahead` a STREAM, which prefetches all that it reads, takes a group with every group.
template <class Dot, int ROWS, int VECTORS, bool STREAM>
void multiply_tile(const char *x, int64_t x_stride, const char *w, int64_t groups, float *sums, bool resume,
                   Prefetch ahead) {
    using Sum = typename Dot::Sum;
    using Factor = typename Dot::Factor;
    Sum sum[ROWS][VECTORS];  // each loop over it is unrolled, or it lies in memory
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
                if (step > 0) asm volatile("" ::: "memory");  // loads nothing early, for which no register is left
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

// Of a number of vectors that multiply_block asks for; those of a STREAM are all of a panel's columns.
template <class Dot> Tile tile_of(int64_t rows, int64_t vectors, bool stream) {
    constexpr std::make_integer_sequence<int, kTileRows> up_to_tile{};
    if constexpr (kWideRows > 0)
        if (vectors == kWideVectors)
            return tile_of_rows<Dot, kWideVectors, false>(rows, std::make_integer_sequence<int, kWideRows>{});
    if constexpr (kTileVectors * kLanes == kColumns)
        if (stream) return tile_of_rows<Dot, kTileVectors, true>(rows, up_to_tile);
    return tile_of_rows<Dot, kTileVectors, false>(rows, up_to_tile);
}
