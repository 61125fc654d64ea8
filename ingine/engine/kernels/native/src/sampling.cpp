// The next token of each row of logits, as defined by ingine/engine/kernels/sampling/reference.py.
#include "candidates.h"

#include <cmath>

struct RowParams {  // ingine/engine/kernels/native/sampling.py writes these
    float temperature;  // 0 is greedy
    float min_p;        // 0 keeps all
    float top_k;        // 0 keeps all
    float top_p;        // 1 keeps all
    float uniform;      // in [0, 1)
};

// Returns the sum that the drawn token is the first to reach: "over uniform * total" means "at least the next number".
static double drawn_mass(float uniform, double total) {
    return std::min(std::nextafter(uniform * total, std::numeric_limits<double>::infinity()), total);
}

struct Sampler {
    Distribution weights;
    Candidates candidates;

    template <typename T> int64_t sample(const LogitsRow<T> &row, const RowParams &params) {
        if (!std::isfinite(row.max())) return -1;
        if (params.temperature == 0) return row.argmax();
        weights.compute(row, params.temperature);
        if (params.min_p <= 0 && params.top_k <= 0 && params.top_p >= 1)
            return weights.find(drawn_mass(params.uniform, weights.total()));
        double mass = truncate(row, params);
        return candidates.find(drawn_mass(params.uniform, mass), row, weights).token_id;
    }

    // Returns the mass of the first candidates: those that min_p, top_k and top_p leave, each applied to what the one
    // before left.
    template <typename T> double truncate(const LogitsRow<T> &row, const RowParams &params) {
        candidates.collect(weights, lowest_needed(params));
        double mass = params.min_p > 0 || params.top_k > 0 ? candidates.mass() : weights.total();
        if (params.top_k > 0 && params.top_k < candidates.size())
            mass = candidates.mass_of_first(int64_t(params.top_k), row, weights);
        return params.top_p < 1 ? candidates.find(params.top_p * mass, row, weights).mass : mass;
    }

    float lowest_needed(const RowParams &params) const {
        float lowest = std::max(params.min_p, std::numeric_limits<float>::min());
        if (params.min_p > 0 && params.top_k <= 0) return lowest;  // top_p is a share of what min_p leaves
        return std::max(lowest, weights.lowest_needed([&](Distribution::Part part) {
            return params.top_k > 0 ? params.top_k <= part.num_tokens
                                    : params.top_p * weights.total() <= part.mass;
        }));
    }
};

template <typename T>
static void sample(const T *logits, const RowParams *params, int64_t *token_ids, int64_t num_rows,
                   int64_t vocab_size) {
#pragma omp parallel for schedule(dynamic) if (num_rows > 1)
    for (int64_t row = 0; row < num_rows; ++row) {
        static thread_local Sampler sampler;
        token_ids[row] = sampler.sample(LogitsRow<T>(logits + row * vocab_size, vocab_size), params[row]);
    }
}

EXPORT void ingine_sample(const void *logits, const void *params, int64_t *token_ids, int64_t num_rows,
                          int64_t vocab_size, int32_t dtype) {
    if (dtype == kFloat32)
        sample((const float *)logits, (const RowParams *)params, token_ids, num_rows, vocab_size);
    else
        sample((const bfloat16 *)logits, (const RowParams *)params, token_ids, num_rows, vocab_size);
}
