// Products on AMX: tiles of 16 rows of x times tiles of 16 columns of weights, 16 groups (64 bytes of a row) at a
// time. AMX reads the layout of a panel directly.
//
// Sums of int8 are the same integers as a Dot's. Sums of bfloat16 have other bits than a Dot's: AMX adds up the even
// and the odd numbers of 16 groups separately. So a process that may use AMX multiplies bfloat16 only with AMX.
#pragma once
#include "dot_int8.h"
#include "tile.h"

constexpr int kAmxRows = 16;      // rows of a tile
constexpr int kAmxPassRows = 32;  // rows of two tiles, which share the tiles of weights
constexpr int kAmxGroups = 16;
constexpr int64_t kAmxStepBytes = kAmxGroups * kPanelGroupBytes;  // bytes of a panel

#if defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__AVX512BF16__) && defined(__AVX512VNNI__)
#define INGINE_AMX
#include <sys/syscall.h>
#include <unistd.h>

template <class Dot> struct AmxDot;

// Tiles 0 and 1 += rows in tile 4 times columns in tiles 6 and 7; tiles 2 and 3 += rows in tile 5 times the same.
template <> struct AmxDot<BFloat16Dot> {
    static void upper() {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
    }
    static void lower() {
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
};

template <> struct AmxDot<Int8Dot> {
    static void upper() {
        _tile_dpbusd(0, 4, 6);
        _tile_dpbusd(1, 4, 7);
    }
    static void lower() {
        _tile_dpbusd(2, 5, 6);
        _tile_dpbusd(3, 5, 7);
    }
};

// Returns whether the system lets this process use tiles, for which it has to ask once.
inline bool amx_is_allowed() {
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    static const bool allowed = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
    return allowed;
}

// Configures the calling thread's tiles, 16 rows of 64 bytes each, and releases them when destroyed.
struct AmxTiles {
    AmxTiles() {
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } config;
        asm volatile("ldtilecfg %0" ::"m"(config));
    }
    ~AmxTiles() { _tile_release(); }
};

// sums[TILES * 16][32] (+)= x[TILES * 16][groups] * w[groups][32]. Prefetches `lines` cache lines of `ahead` for every
// 16 groups. If `x` is not aligned to 64 bytes, each row of a tile takes two cache lines.
template <class Dot, int TILES>
void multiply_amx_tiles(const char *x, int64_t x_stride, const char *w, int64_t groups, float *sums, bool resume,
                        const char *ahead, int64_t lines) {
    constexpr int64_t kSumStride = kColumns * 4;
    const char *lower_x = x + kAmxRows * x_stride;
    // These have names, since the macros of g++ 11.1 and 11.2 cast only the first operand of a sum.
    float *lower_sums = sums + kAmxRows * kColumns;
    float *right_sums = sums + kAmxRows, *lower_right_sums = lower_sums + kAmxRows;
    asm volatile("" ::: "memory");  // g++ does not know that the intrinsics read memory
    if (resume) {
        _tile_loadd(0, sums, kSumStride);
        _tile_loadd(1, right_sums, kSumStride);
        if constexpr (TILES == 2) {
            _tile_loadd(2, lower_sums, kSumStride);
            _tile_loadd(3, lower_right_sums, kSumStride);
        }
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t g = 0; g < groups; g += kAmxGroups) {
        _tile_loadd(4, x, x_stride);
        _tile_loadd(6, w, kPanelGroupBytes);
        const char *right = w + kPanelGroupBytes / 2;
        _tile_loadd(7, right, kPanelGroupBytes);
        AmxDot<Dot>::upper();
        if constexpr (TILES == 2) {
            _tile_loadd(5, lower_x, x_stride);
            AmxDot<Dot>::lower();
        }
        for (int64_t l = 0; l < lines; l++) __builtin_prefetch(ahead + l * 64, 0, 2);
        x += 64, lower_x += 64, w += kAmxStepBytes, ahead += lines * 64;
    }
    _tile_stored(0, sums, kSumStride);
    _tile_stored(1, right_sums, kSumStride);
    if constexpr (TILES == 2) {
        _tile_stored(2, lower_sums, kSumStride);
        _tile_stored(3, lower_right_sums, kSumStride);
    }
}
#endif
