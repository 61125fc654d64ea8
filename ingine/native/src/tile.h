// The inner loop of linear.cpp: a few rows times a few vectors of columns, whose sums stay in registers.
#pragma once
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

// sums[ROWS][VECTORS * kLanes] (+)= x[ROWS][groups] * w[groups][VECTORS * kLanes], rows of sums and groups of w
// being kColumns apart; and LINES cache lines a group of `ahead` prefetched.
template <class Dot, int ROWS, int VECTORS, int LINES>
void multiply_tile(const char *x, int64_t x_stride, const char *w, int64_t groups, float *sums, bool resume,
                   const char *ahead) {
    using Sum = typename Dot::Sum;
    using Factor = typename Dot::Factor;
    Sum sum[ROWS][VECTORS];  // each loop over it is unrolled, or it lies in memory
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 16
        for (int v = 0; v < VECTORS; v++)
            sum[r][v] = resume ? load_as<Sum>(sums + r * kColumns + v * kLanes) : Sum{};
    for (int64_t g = 0; g < groups; g++) {
        for (int l = 0; l < LINES; l++) __builtin_prefetch(ahead + l * 64, 0, 2);
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
        x += Dot::kSteps * 4, w += kPanelGroupBytes, ahead += LINES * 64;
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 16
        for (int v = 0; v < VECTORS; v++) store_as(sums + r * kColumns + v * kLanes, sum[r][v]);
}

using Tile = void (*)(const char *, int64_t, const char *, int64_t, float *, bool, const char *);

template <class Dot, int VECTORS, int LINES, int... ROW>
Tile tile_of_rows(int64_t rows, std::integer_sequence<int, ROW...>) {
    static constexpr Tile tiles[] = {multiply_tile<Dot, ROW + 1, VECTORS, LINES>...};
    return tiles[rows - 1];
}

// Of the numbers of vectors and lines that multiply_block asks for.
template <class Dot> Tile tile_of(int64_t rows, int64_t vectors, int lines) {
    constexpr std::make_integer_sequence<int, kTileRows> up_to_tile{};
    if constexpr (kWideRows > 0) {
        constexpr std::make_integer_sequence<int, kWideRows> up_to_wide{};
        if (vectors == kWideVectors)
            return lines ? tile_of_rows<Dot, kWideVectors, 1>(rows, up_to_wide)
                         : tile_of_rows<Dot, kWideVectors, 0>(rows, up_to_wide);
    }
    if constexpr (kTileVectors * kLanes == kColumns)
        if (lines == 2) return tile_of_rows<Dot, kTileVectors, 2>(rows, up_to_tile);
    return lines ? tile_of_rows<Dot, kTileVectors, 1>(rows, up_to_tile)
                 : tile_of_rows<Dot, kTileVectors, 0>(rows, up_to_tile);
}
