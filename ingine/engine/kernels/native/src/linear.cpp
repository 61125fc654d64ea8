// Products with the weights of linear layers, out = X W^T + bias, in float32, bfloat16 and int8, on any CPU.
//
// There is one algorithm: 4 bytes of weights (1 float32, 2 bfloat16 or 4 int8: a "group") of some columns are
// multiplied by the same numbers of a row, broadcast (dot.h). W is packed once into panels of 32 columns,
// [n / 32][groups][32 columns][4 bytes], so that a panel is one stream of memory. Each thread owns a range of panels.
// It multiplies a panel by all rows, tile by tile, and prefetches the next panel meanwhile, so that reading and
// computing overlap.
//
// Every output is one accumulator to which k is added in ascending order, for any number of rows or threads: a row's
// result does not depend on its batch. AMX (amx.h) adds 16 groups of k at a time, for bfloat16 with any number of
// rows.
#include <omp.h>

#include "amx.h"
#include "quantize.h"
#include "tile.h"

namespace {

constexpr int64_t kBlockGroups = 1024;  // 128 KiB of a panel, which stays in L2 with the rows
constexpr int64_t kBlockRows = 480;     // rows that a panel is multiplied by before the next one is read
constexpr int64_t kHardwareRows = 4;    // up to this number the processor's own prefetching is fastest
constexpr int64_t kStreamAhead = 8192;  // bytes ahead of the reader where a panel is read only once

// On AMX a block of a panel, 16 KiB, stays in L1 with the same block of 32 rows. With more than kAmxStreamRows rows, a
// block of the rows stays in L2 while it is multiplied by the blocks of a few panels.
constexpr int64_t kAmxBlockGroups = 128, kAmxPanels = 4, kAmxStreamRows = 64;

// Arrays over columns are padded with zeros to whole panels.
template <typename T> struct Product {
    const char *w;          // packed
    const float *w_scale;   // int8: [n]
    const int32_t *w_sum;   // int8: [n], the sum of each column
    const float *x_scale;   // int8: [rows]
    const float *bias;      // [n] or null
    T *out;                 // [rows, n]
    int64_t n, groups;
};

// Rows in the form that a Dot multiplies, each `stride` bytes after the one before.
struct Rows {
    const char *x;
    int64_t count, stride;
};

// Writes kLanes columns of a row, from column n on: their accumulators as float, scaled (int8), plus the bias.
template <class Dot, typename T> void write(const Product<T> &p, const float *sums, int64_t row, int64_t n) {
    if (n >= p.n) return;  // columns that pad the last panel
    floats v;
    if constexpr (std::is_same_v<Dot, Int8Dot>) {  // x was stored with kZero added to it
        const ints sum = load_as<ints>(sums) - load_as<ints>(p.w_sum + n) * Dot::kZero;
        v = __builtin_convertvector(sum, floats) * load(p.w_scale + n);
        // An explicit fma: otherwise g++ may fuse or not wherever this is inlined.
        v = p.bias ? fma(v, splat(p.x_scale[row]), load(p.bias + n)) : v * p.x_scale[row];
    } else {
        v = load(sums);
        if (p.bias) v = v + load(p.bias + n);
    }
    store(p.out + row * p.n + n, v, p.n - n);
}

// Multiplies one block of a panel by some rows, in tiles of nearly equal size, each over all columns or a part of
// them. Each pass prefetches an equal part of what is read next, since prefetching faster than memory delivers would
// delay the multiplication. A single pass prefetches the same panel, far ahead of the reader.
template <class Dot>
void multiply_block(const char *w, int64_t groups, const Rows &rows, bool resume, float *sums) {
    const int64_t vectors = rows.count <= kWideRows ? kWideVectors : kTileVectors;
    const int64_t columns = vectors * kLanes, parts = kColumns / columns;
    const int64_t tiles = (rows.count + kTileRows - 1) / kTileRows, passes = parts * tiles;
    const bool stream = passes == 1 && rows.count > kHardwareRows;
    Prefetch ahead{w + groups * kPanelGroupBytes, passes / 2};  // a group is two lines
    if (passes == 1) ahead = {w + kStreamAhead, groups};
    for (int64_t part = 0; part < parts; part++)
        for (int64_t t = 0, row = 0; t < tiles; t++) {
            const int64_t size = rows.count / tiles + (t < rows.count % tiles);
            const Tile tile = tile_of<Dot>(size, vectors, stream);
            tile(rows.x + row * rows.stride, rows.stride, w + part * columns * kGroupBytes, groups,
                 sums + row * kColumns + part * columns, resume, ahead);
            row += size, ahead.from += groups / ahead.every * 64;
        }
}

// Writes `count` rows of a panel, from row `start` on.
template <class Dot, typename T>
void write_panel(const Product<T> &p, const float *sums, int64_t start, int64_t count, int64_t panel) {
    for (int64_t row = 0; row < count; row++)
        for (int64_t column = 0; column < kColumns; column += kLanes)
            write<Dot>(p, sums + row * kColumns + column, start + row, panel * kColumns + column);
}

// Returns the calling thread's range of panels.
std::pair<int64_t, int64_t> own_panels(int64_t n) {
    const int64_t thread = omp_get_thread_num(), num_threads = omp_get_num_threads();
    const int64_t panels = (n + kColumns - 1) / kColumns;
    return {panels * thread / num_threads, panels * (thread + 1) / num_threads};
}

// Multiplies the calling thread's panels by all rows.
template <class Dot, typename T> void multiply(const Product<T> &p, const Rows &all) {
    alignas(64) static thread_local float sums[kBlockRows * kColumns];
    const auto [first, last] = own_panels(p.n);
    for (int64_t start = 0; start < all.count; start += kBlockRows) {
        const int64_t count = std::min(kBlockRows, all.count - start);
        for (int64_t panel = first; panel < last; panel++) {
            for (int64_t g = 0; g < p.groups; g += kBlockGroups) {
                const Rows rows{all.x + start * all.stride + g * Dot::kSteps * 4, count, all.stride};
                multiply_block<Dot>(p.w + (panel * p.groups + g) * kPanelGroupBytes,
                                    std::min(kBlockGroups, p.groups - g), rows, g > 0, sums);
            }
            write_panel<Dot>(p, sums, start, count, panel);
        }
    }
}

#ifdef INGINE_AMX
// Does the same as multiply_block, with 32 rows in a pass. All passes together prefetch `next`; a single pass
// prefetches the same panel, far ahead.
template <class Dot>
void multiply_amx_block(const char *w, int64_t groups, const Rows &rows, bool resume, float *sums,
                        const char *next) {
    const int64_t whole = groups / kAmxGroups * kAmxGroups;
    alignas(64) char tail[kAmxStepBytes];  // the remaining groups, padded with zeros
    if (whole < groups) {
        const int64_t bytes = (groups - whole) * kPanelGroupBytes;
        std::memcpy(tail, w + whole * kPanelGroupBytes, bytes);
        std::memset(tail + bytes, 0, sizeof tail - bytes);
    }
    const int64_t passes = (rows.count + kAmxPassRows - 1) / kAmxPassRows;
    const int64_t lines = (kAmxStepBytes / 64 + passes - 1) / passes;
    if (passes == 1) next = w + kStreamAhead;
    for (int64_t row = 0; row < rows.count; row += kAmxPassRows) {
        const auto tiles = rows.count - row > kAmxRows ? multiply_amx_tiles<Dot, 2> : multiply_amx_tiles<Dot, 1>;
        const char *x = rows.x + row * rows.stride;
        float *to = sums + row * kColumns;
        tiles(x, rows.stride, w, whole, to, resume, next, lines);
        if (whole < groups)
            tiles(x + whole * kGroupBytes, rows.stride, tail, kAmxGroups, to, resume || whole > 0, next, 0);
        next += whole / kAmxGroups * lines * 64;
    }
}

// Does the same as multiply. `all` has room for whole tiles of rows, and each row for a multiple of 64 bytes. The
// padding is zeros in bfloat16; in int8 it is arbitrary, since it is multiplied by the zeros of the weights' tail.
template <class Dot, typename T> void multiply_on_amx(const Product<T> &p, const Rows &all) {
    alignas(64) static thread_local float sums[kAmxPanels][kBlockRows * kColumns];
    const auto [first, last] = own_panels(p.n);
    const int64_t block = all.count > kAmxPassRows ? kAmxBlockGroups : p.groups;
    const int64_t batch = all.count > kAmxStreamRows ? kAmxPanels : 1;
    const auto weights = [&](int64_t panel, int64_t g) { return p.w + (panel * p.groups + g) * kPanelGroupBytes; };
    const AmxTiles tiles;
    for (int64_t start = 0; start < all.count; start += kBlockRows) {
        const int64_t count = std::min(kBlockRows, all.count - start);
        for (int64_t from = first, to; from < last; from = to) {
            to = std::min(from + batch, last);
            for (int64_t g = 0; g < p.groups; g += block) {
                const Rows rows{all.x + start * all.stride + g * kGroupBytes, count, all.stride};
                const bool done = g + block >= p.groups;
                for (int64_t panel = from; panel < to; panel++) {
                    const char *next = panel + 1 < to ? weights(panel + 1, g)
                                       : done         ? weights(to, 0)
                                                      : weights(from, g + block);
                    multiply_amx_block<Dot>(weights(panel, g), std::min(block, p.groups - g), rows, g > 0,
                                            sums[panel - from], next);
                    if (done) write_panel<Dot>(p, sums[panel - from], start, count, panel);
                }
            }
        }
    }
}
#endif

// Memory for the rows to multiply, in whole tiles of AMX, which the calling thread keeps. Each row begins at a cache
// line, an odd number of lines after the row before: otherwise the rows of a tile would share a set of L1.
struct RowMemory {
    int64_t stride;
    char *rows;

    RowMemory(std::vector<char> &memory, int64_t num_rows, int64_t row_bytes)
        : stride(((row_bytes + 63) / 64 | 1) * 64) {
        memory.resize((num_rows + kAmxRows - 1) / kAmxRows * kAmxRows * stride + 63);
        rows = (char *)((uintptr_t(memory.data()) + 63) / 64 * 64);
    }
};

#ifdef INGINE_AMX
void multiply_bfloat16_on_amx(const Product<bfloat16> &product, const bfloat16 *x, int64_t rows, int64_t k) {
    static thread_local std::vector<char> memory;
    const RowMemory copy(memory, rows, k * 2);
#pragma omp parallel
    {
#pragma omp for
        for (int64_t row = 0; row < rows; row++) {
            char *to = copy.rows + row * copy.stride;
            std::memcpy(to, x + row * k, k * 2);
            std::memset(to + k * 2, 0, copy.stride - k * 2);
        }
        multiply_on_amx<BFloat16Dot>(product, {copy.rows, rows, copy.stride});
    }
}
#endif

// Multiplies bfloat16 x, as it is if the CPU has bfloat16 products, else expanded to float32.
void multiply_bfloat16(const Product<bfloat16> &product, const bfloat16 *x, int64_t rows, int64_t k) {
#ifdef INGINE_AMX
    if (amx_is_allowed()) return multiply_bfloat16_on_amx(product, x, rows, k);
#endif
    if constexpr (BFloat16Dot::kSteps == 1) {
#pragma omp parallel
        multiply<BFloat16Dot>(product, {(const char *)x, rows, k * 2});
        return;
    }
    static thread_local std::vector<float> expanded_rows;
    expanded_rows.resize(rows * k);
    float *expanded = expanded_rows.data();
#pragma omp parallel
    {
#pragma omp for
        for (int64_t row = 0; row < rows; row++)
            for (int64_t i = row * k; i < (row + 1) * k; i++) expanded[i] = to_float(x[i]);
        multiply<BFloat16Dot>(product, {(const char *)expanded, rows, k * 4});
    }
}

template <typename T>
void multiply_int8(Product<T> product, const T *x, int64_t rows, int64_t k, int64_t rotation) {
    static thread_local std::vector<char> memory;
    static thread_local std::vector<float> scale_of_rows;
    const RowMemory quantized(memory, rows, (k + kRotated - 1) / kRotated * kRotated * Int8Dot::kSteps);
    scale_of_rows.resize(rows);
    float *scales = scale_of_rows.data();
    product.x_scale = scales;
#pragma omp parallel
    {
#pragma omp for
        for (int64_t row = 0; row < rows; row++)
            quantize_row<Int8Dot>(x + row * k, k, rotation, quantized.rows + row * quantized.stride, scales + row);
        const Rows all{quantized.rows, rows, quantized.stride};
#ifdef INGINE_AMX
        if (rows > kAmxRows && amx_is_allowed())  // a tile that is not full is 5 to 10 % slower than the Dot
            multiply_on_amx<Int8Dot>(product, all);
        else
#endif
            multiply<Int8Dot>(product, all);
    }
}

}  // namespace

// Returns the instruction set that multiplies weights of `size` bytes an element.
EXPORT const char *ingine_linear_isa(int64_t size) {
#ifdef INGINE_AMX
    if (size < 4 && amx_is_allowed()) return size == 2 ? "amx-bf16" : "amx-int8";
#endif
    return size == 4 ? Float32Dot::kIsa : size == 2 ? BFloat16Dot::kIsa : Int8Dot::kIsa;
}

// x [rows, k], the weights and out [rows, n] are of `dtype`, bias is float or null, w is from ingine_linear_pack;
// bfloat16: k % 2 == 0.
EXPORT void ingine_linear(int32_t dtype, const void *x, const char *w, const float *bias, void *out, int64_t rows,
                          int64_t n, int64_t k) {
    if (dtype == kBFloat16) {
        const Product<bfloat16> product{w, nullptr, nullptr, nullptr, bias, (bfloat16 *)out, n, k / 2};
        multiply_bfloat16(product, (const bfloat16 *)x, rows, k);
    } else {
        const Product<float> product{w, nullptr, nullptr, nullptr, bias, (float *)out, n, k};
#pragma omp parallel
        multiply<Float32Dot>(product, {(const char *)x, rows, k * 4});
    }
}

// The same as ingine_linear with int8 weights w[i, j] * w_scale[i], whose rows have the sums w_sum; k % 4 == 0. Each
// row of x is first rotated, `rotation` numbers at a time, and quantized.
EXPORT void ingine_linear_int8(int32_t dtype, const void *x, const char *w, const float *w_scale,
                               const int32_t *w_sum, const float *bias, void *out, int64_t rows, int64_t n,
                               int64_t k, int64_t rotation) {
    if (dtype == kBFloat16)
        multiply_int8<bfloat16>({w, w_scale, w_sum, nullptr, bias, (bfloat16 *)out, n, k / 4},
                                (const bfloat16 *)x, rows, k, rotation);
    else
        multiply_int8<float>({w, w_scale, w_sum, nullptr, bias, (float *)out, n, k / 4}, (const float *)x, rows,
                             k, rotation);
}

// Packs W [n, k], with `size` bytes an element (4, 2 or 1), into panels; the last one is padded with zeros.
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

// out[i] = W[ids[i]], read from the panels, `size` bytes an element: the embedding of a tied vocabulary matrix.
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
