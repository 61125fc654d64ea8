// Log probabilities and ranks of each row's chosen token, and log probabilities of its likeliest tokens, as defined by
// ingine/engine/kernels/sampling/logprobs.py.
#include "candidates.h"

#include <cmath>
#include <numeric>

// Returns the likeliest tokens of a row, likeliest first. Used if too few tokens have a weight above 0: a logit far
// below the largest has a weight of 0 in float32, but still a log probability.
template <typename T>
static std::vector<int64_t> first_of_all(int64_t num_tokens, const LogitsRow<T> &row) {
    std::vector<int64_t> token_ids(row.vocab_size());
    std::iota(token_ids.begin(), token_ids.end(), 0);
    num_tokens = std::min(num_tokens, row.vocab_size());
    std::partial_sort(token_ids.begin(), token_ids.begin() + num_tokens, token_ids.end(),
                      [&](int64_t a, int64_t b) { return row[a] > row[b] || (row[a] == row[b] && a < b); });
    token_ids.resize(num_tokens);
    return token_ids;
}

// Returns the number of tokens whose logit is at least that of `token_id`.
template <typename T> static int64_t rank_of(int64_t token_id, const LogitsRow<T> &row) {
    float value = row[token_id];
    int64_t rank = 0;
    for (int64_t block = 0; block < row.num_blocks(); ++block) {
        if (row.block_max(block) < value) continue;
        const T *logits = row.block(block);
        int count = 0;
#pragma omp simd reduction(+ : count)
        for (int64_t i = 0; i < row.block_size(block); ++i) count += to_float(logits[i]) >= value;
        rank += count;
    }
    return rank;
}

// If no token was chosen (-1), its log probability is NaN and its rank 0. In a row whose largest logit is not finite, the likeliest
// tokens have id 0 and -inf.
template <typename T>
static void logprobs(const T *logits, const int64_t *chosen_ids, float *chosen, int64_t *ranks, int64_t *top_ids,
                     float *top, int64_t num_rows, int64_t vocab_size, int64_t num_top) {
#pragma omp parallel for schedule(dynamic) if (num_rows > 1)
    for (int64_t r = 0; r < num_rows; ++r) {
        static thread_local Distribution weights;
        static thread_local Candidates candidates;
        std::fill_n(top_ids + r * num_top, num_top, 0);
        std::fill_n(top + r * num_top, num_top, -std::numeric_limits<float>::infinity());
        chosen[r] = std::numeric_limits<float>::quiet_NaN();
        ranks[r] = 0;
        LogitsRow<T> row(logits + r * vocab_size, vocab_size);
        if (chosen_ids[r] < 0 || !std::isfinite(row.max())) continue;
        weights.compute(row, 1);
        auto log_total = float(std::log(weights.total()));
        chosen[r] = row[chosen_ids[r]] - row.max() - log_total;
        ranks[r] = rank_of(chosen_ids[r], row);
        if (num_top == 0) continue;
        auto has_enough = [&](Distribution::Part part) { return part.num_tokens >= num_top; };
        candidates.collect(weights, weights.lowest_needed(has_enough));
        int64_t place = r * num_top;
        bool are_enough = candidates.size() >= num_top;
        for (int64_t token_id : are_enough ? candidates.first(num_top, row) : first_of_all(num_top, row)) {
            top_ids[place] = token_id;
            top[place++] = row[token_id] - row.max() - log_total;
        }
    }
}

EXPORT void ingine_logprobs(const void *logits, const int64_t *chosen_ids, float *chosen, int64_t *ranks,
                            int64_t *top_ids, float *top, int64_t num_rows, int64_t vocab_size, int64_t num_top,
                            int32_t dtype) {
    if (dtype == kFloat32)
        logprobs((const float *)logits, chosen_ids, chosen, ranks, top_ids, top, num_rows, vocab_size, num_top);
    else
        logprobs((const bfloat16 *)logits, chosen_ids, chosen, ranks, top_ids, top, num_rows, vocab_size,
                 num_top);
}
