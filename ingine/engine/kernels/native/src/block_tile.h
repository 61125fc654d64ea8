// The inner loop of blocks.cpp: multiplies a few rows of x by a few vectors of columns of an expanded chunk.
#pragma once
#include <utility>

#include "block_formats.h"

#if defined(__AVX512F__) && defined(__AVX512BW__)
constexpr int kBlockTileRows = 10, kBlockTileVectors = 2;
#elif defined(__aarch64__)
constexpr int kBlockTileRows = 5, kBlockTileVectors = 4;
#else
constexpr int kBlockTileRows = 4, kBlockTileVectors = 2;
#endif

// The initial sum of a group: the amount that its codes' zeros add, negated.
template <class Kind> inline int32_t initial_sum(const RowGroup &x, int half) {
    if constexpr (Kind::kZero == 8) return x.minus_8_sums;
    if constexpr (Kind::kZero == 128) return x.minus_128_sums;
    if constexpr (Kind::kZero == 32) return x.minus_32_sums[half];
    return 0;
}

// sums[ROWS][columns] += x[ROWS][groups] * w. The sum of each group is exact in whole numbers, then scaled and added,
// group by group. Rows of x are kGroups groups apart, rows of sums kPanel numbers.
template <class Kind, int ROWS>
void multiply_block_tile(const RowGroup *x, const Chunk &w, int column, int64_t groups, float *sums) {
    using Dot = BlockDot<Kind::kBits>;
    constexpr int kVectors = kBlockTileVectors, kSteps = Kind::kGroup / 4;
    constexpr int kChain = std::min(Dot::kChain, kSteps), kParts = kGroupNumbers / Kind::kGroup;
    for (int64_t part = 0; part < groups * kParts; part++) {
        const RowGroup *group = x + part / kParts;
        const int half = part % kParts;
        ints sum[ROWS][kVectors];  // each loop over it is unrolled, otherwise it is kept in memory
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 16
            for (int v = 0; v < kVectors; v++) sum[r][v] = splat(initial_sum<Kind>(group[r * kGroups], half));
        for (int first = 0; first < kSteps; first += kChain) {
            typename Dot::Chain chain[ROWS][kVectors];
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 16
                for (int v = 0; v < kVectors; v++) chain[r][v] = Dot::start(sum[r][v]);
            for (int step = first; step < first + kChain; step++) {
                typename Dot::Weights weights[kVectors];
#pragma GCC unroll 16
                for (int v = 0; v < kVectors; v++)
                    weights[v] = Dot::weights(load_as<ints>(w.codes[part * kSteps + step] + column + v * kLanes));
#pragma GCC unroll 16
                for (int r = 0; r < ROWS; r++) {
                    const auto broadcast = Dot::broadcast(group[r * kGroups].numbers + half * Kind::kGroup + step * 4);
#pragma GCC unroll 16
                    for (int v = 0; v < kVectors; v++) chain[r][v] = Dot::add(chain[r][v], weights[v], broadcast);
                }
            }
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 16
                for (int v = 0; v < kVectors; v++) sum[r][v] = Dot::finish(sum[r][v], chain[r][v]);
        }
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 16
            for (int v = 0; v < kVectors; v++) {
                float *to = sums + r * kPanel + column + v * kLanes;
                const floats scale = load(w.scale[part] + column + v * kLanes) * splat(group[r * kGroups].scale);
                floats total = fma(__builtin_convertvector(sum[r][v], floats), scale, load(to));
                if constexpr (Kind::kHasMin)
                    total = fma(load(w.min[part] + column + v * kLanes), splat(group[r * kGroups].scaled_sum), total);
                store(to, total);
            }
    }
}

using BlockTile = void (*)(const RowGroup *, const Chunk &, int, int64_t, float *);

template <class Kind, int... ROW> BlockTile block_tile_of(int64_t rows, std::integer_sequence<int, ROW...>) {
    static constexpr BlockTile tiles[] = {multiply_block_tile<Kind, ROW + 1>...};
    return tiles[rows - 1];
}

// sums[rows][kPanel] += x[rows][groups] * w, in tiles of nearly equal size.
template <class Kind>
void multiply_chunk(const RowGroup *x, int64_t rows, const Chunk &w, int64_t groups, float *sums) {
    constexpr std::make_integer_sequence<int, kBlockTileRows> up_to_tile{};
    const int64_t tiles = (rows + kBlockTileRows - 1) / kBlockTileRows;
    for (int64_t t = 0, row = 0; t < tiles; t++) {
        const int64_t size = rows / tiles + (t < rows % tiles);
        const BlockTile tile = block_tile_of<Kind>(size, up_to_tile);
        for (int column = 0; column < kPanel; column += kBlockTileVectors * kLanes)
            tile(x + row * kGroups, w, column, groups, sums + row * kPanel);
        row += size;
    }
}
