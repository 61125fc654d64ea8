// Tokens that a grammar forbids. ingine/engine/kernels/sampling/masks.py is the definition.
#include "vec.h"

// Word w of a mask says of tokens 32 w to 32 w + 31, from its lowest bit on, which are allowed. Most words are
// 0, or have all bits. `infinity` has the bits of -inf, as a number of the logits' size.
template <typename Bits>
static void mask_row(Bits *logits, const uint32_t *mask, int64_t vocab_size, Bits infinity) {
    for (int64_t start = 0; start < vocab_size; start += 32) {
        uint32_t word = mask[start / 32];
        if (word == 0xFFFFFFFFu) continue;
        int64_t size = vocab_size - start < 32 ? vocab_size - start : 32;
        Bits *x = logits + start;
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) x[i] = (word >> i) & 1 ? x[i] : infinity;
    }
}

template <typename Bits>
static void mask_rows(Bits *logits, const int64_t *rows, const uint32_t *masks, int64_t num_rows,
                      int64_t vocab_size, int64_t num_words, Bits infinity) {
#pragma omp parallel for if (num_rows > 3)
    for (int64_t i = 0; i < num_rows; ++i)
        mask_row(logits + rows[i] * vocab_size, masks + i * num_words, vocab_size, infinity);
}

EXPORT void ingine_mask(void *logits, const int64_t *rows, const void *masks, int64_t num_rows,
                        int64_t vocab_size, int64_t num_words, int32_t dtype) {
    auto words = (const uint32_t *)masks;
    if (dtype == kFloat32)
        mask_rows((uint32_t *)logits, rows, words, num_rows, vocab_size, num_words, uint32_t(0xFF800000u));
    else
        mask_rows((uint16_t *)logits, rows, words, num_rows, vocab_size, num_words, uint16_t(0xFF80u));
}
