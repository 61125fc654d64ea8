// One row of logits, its largest, and its distribution at a temperature.
#pragma once
#include "vec_math.h"

#include <algorithm>
#include <limits>
#include <vector>

// Tokens are processed in blocks of this size. Sums are float within a block and double over all blocks.
constexpr int64_t kBlock = 64;

template <typename T> class LogitsRow {
  public:
    LogitsRow(const T *logits, int64_t vocab_size)
        : logits_(logits), vocab_size_(vocab_size), block_max_((vocab_size + kBlock - 1) / kBlock) {
        int is_nan = 0;
        max_ = -std::numeric_limits<float>::infinity();
        for (int64_t block = 0; block < num_blocks(); ++block) {
            float max = -std::numeric_limits<float>::infinity();
            const T *x = logits_ + block * kBlock;
#pragma omp simd reduction(max : max) reduction(| : is_nan)
            for (int64_t i = 0; i < block_size(block); ++i) {
                float value = to_float(x[i]);
                max = value > max ? value : max;
                is_nan |= value != value;
            }
            block_max_[block] = max;
            max_ = std::max(max_, max);
        }
        if (is_nan) max_ = std::numeric_limits<float>::quiet_NaN();
    }

    float operator[](int64_t token_id) const { return to_float(logits_[token_id]); }
    const T *block(int64_t block) const { return logits_ + block * kBlock; }
    int64_t vocab_size() const { return vocab_size_; }
    int64_t num_blocks() const { return int64_t(block_max_.size()); }
    int64_t block_size(int64_t block) const { return std::min(kBlock, vocab_size_ - block * kBlock); }

    // NaN if any logit is.
    float max() const { return max_; }
    float block_max(int64_t block) const { return block_max_[block]; }

    // The lowest id with the largest logit, which must not be NaN.
    int64_t argmax() const {
        auto block = std::find(block_max_.begin(), block_max_.end(), max_) - block_max_.begin();
        int64_t token_id = block * kBlock;
        while ((*this)[token_id] != max_) ++token_id;
        return token_id;
    }

  private:
    const T *logits_;
    int64_t vocab_size_;
    float max_;
    std::vector<float> block_max_;
};

// Probabilities by token id, as multiples of the largest, which is exactly 1: the weights. Memory is kept
// from row to row.
class Distribution {
  public:
    // The row's largest logit must be finite.
    template <typename T> void compute(const LogitsRow<T> &row, float temperature) {
        float inv_temperature = 1 / temperature, max = row.max();
        weights_.resize(row.vocab_size());
        block_max_.resize(row.num_blocks());
        cdf_.resize(row.num_blocks());
        double total = 0;
        for (int64_t block = 0; block < row.num_blocks(); ++block) {
            const T *logits = row.block(block);
            float *weights = &weights_[block * kBlock], sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < row.block_size(block); ++i) {
                weights[i] = exp_approx((to_float(logits[i]) - max) * inv_temperature);
                sum += weights[i];
            }
            cdf_[block] = total += sum;
            block_max_[block] = exp_approx((row.block_max(block) - max) * inv_temperature);
        }
    }

    float operator[](int64_t token_id) const { return weights_[token_id]; }
    int64_t vocab_size() const { return int64_t(weights_.size()); }
    int64_t num_blocks() const { return int64_t(cdf_.size()); }
    int64_t block_end(int64_t block) const { return std::min((block + 1) * kBlock, vocab_size()); }
    float block_max(int64_t block) const { return block_max_[block]; }

    double total() const { return cdf_.back(); }

    struct Part {
        int64_t num_tokens;
        double mass;
    };

    // Returns the tokens whose weight is at least `cutoff`.
    Part over(float cutoff) const {
        Part part = {0, 0};
        for (int64_t block = 0; block < num_blocks(); ++block) {
            if (block_max_[block] < cutoff) continue;
            float sum = 0;
            int count = 0;
#pragma omp simd reduction(+ : sum, count)
            for (int64_t i = block * kBlock; i < block_end(block); ++i) {
                sum += weights_[i] >= cutoff ? weights_[i] : 0;
                count += weights_[i] >= cutoff;
            }
            part.num_tokens += count;
            part.mass += sum;
        }
        return part;
    }

    // Returns a weight above 0 such that the part over it is enough. Most rows are so peaked that the part is small.
    template <typename Predicate> float lowest_needed(Predicate is_enough) const {
        for (float cutoff : {2.5e-3f, 2.5e-4f, 6e-6f})
            if (is_enough(over(cutoff))) return cutoff;
        return std::numeric_limits<float>::min();
    }

    // Returns the first token, in the order of the ids, at which the sum of weights reaches `mass`, which is above 0
    // and at most the total. Never returns a token of weight 0.
    int64_t find(double mass) const {
        int64_t block = std::lower_bound(cdf_.begin(), cdf_.end(), mass) - cdf_.begin();
        double sum = block ? cdf_[block - 1] : 0;
        int64_t found = 0;
        for (int64_t i = block * kBlock; i < block_end(block) && sum < mass; ++i) {
            sum += weights_[i];
            if (weights_[i] > 0) found = i;  // the last one, if rounding keeps this sum below `mass`
        }
        return found;
    }

  private:
    std::vector<float> weights_, block_max_;
    std::vector<double> cdf_;  // by block, inclusive
};
