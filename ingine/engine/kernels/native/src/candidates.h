// The likeliest tokens of a row in the order of their logits; equal logits in the order of their ids.
#pragma once
#include "logits_row.h"

// The tokens are not sorted, but counted into buckets by weight: a sum is located in its bucket, and only that bucket
// is sorted. Memory is kept from row to row.
class Candidates {
  public:
    Candidates() : buckets_(kNumBuckets) {}

    // Takes all tokens whose weight is at least `cutoff`, which is over 0.
    void collect(const Distribution &weights, float cutoff) {
        token_ids_.resize(weights.vocab_size());
        bucket_of_.resize(weights.vocab_size());
        size_ = 0;
        for (int64_t block = 0; block < weights.num_blocks(); ++block) {
            if (weights.block_max(block) < cutoff) continue;
            for (int64_t i = block * kBlock; i < weights.block_end(block); ++i) {
                token_ids_[size_] = int32_t(i);
                size_ += weights[i] >= cutoff;  // no branch, since it could not be predicted
            }
        }
        std::fill(buckets_.begin(), buckets_.end(), Bucket{0, 0});
        for (int64_t i = 0; i < size_; ++i) {
            float weight = weights[token_ids_[i]];
            bucket_of_[i] = bucket(weight);
            buckets_[bucket_of_[i]].mass += weight;
            ++buckets_[bucket_of_[i]].num_tokens;
        }
        sorted_bucket_ = -1;
    }

    int64_t size() const { return size_; }

    double mass() const {
        double sum = 0;
        for (const Bucket &bucket : buckets_) sum += bucket.mass;
        return sum;
    }

    // Returns the ids of the first `num_tokens` tokens, or of all if there are fewer.
    template <typename T> std::vector<int64_t> first(int64_t num_tokens, const LogitsRow<T> &row) {
        std::vector<int64_t> token_ids;
        for (int64_t bucket = 0; bucket < kNumBuckets; ++bucket) {
            if (buckets_[bucket].num_tokens == 0) continue;
            sort(bucket, row);
            for (uint64_t key : sorted_) {
                if (int64_t(token_ids.size()) == num_tokens) return token_ids;
                token_ids.push_back(int64_t(key & kIdMask));
            }
        }
        return token_ids;
    }

    // Returns the sum of the weights of the first `num_tokens` tokens; there must be as many.
    template <typename T>
    double mass_of_first(int64_t num_tokens, const LogitsRow<T> &row, const Distribution &weights) {
        int64_t bucket = 0;
        double sum = 0;
        for (; num_tokens > buckets_[bucket].num_tokens; ++bucket) {
            num_tokens -= buckets_[bucket].num_tokens;
            sum += buckets_[bucket].mass;
        }
        sort(bucket, row);
        for (int64_t i = 0; i < num_tokens; ++i) sum += weights[int64_t(sorted_[i] & kIdMask)];
        return sum;
    }

    struct Position {
        int64_t token_id;
        double mass;  // of all tokens up to this one, inclusive
    };

    // Returns the first token at which the sum of weights reaches `mass`; the last one if none does.
    template <typename T> Position find(double mass, const LogitsRow<T> &row, const Distribution &weights) {
        int64_t bucket = 0, last = kNumBuckets - 1;
        double sum = 0;
        while (buckets_[last].num_tokens == 0) --last;
        for (; bucket < last && sum + buckets_[bucket].mass < mass; ++bucket) sum += buckets_[bucket].mass;
        sort(bucket, row);
        int64_t token_id = 0;
        for (uint64_t key : sorted_) {
            token_id = int64_t(key & kIdMask);
            sum += weights[token_id];
            if (sum >= mass) break;
        }
        return {token_id, sum};
    }

  private:
    struct Bucket {
        double mass;
        int64_t num_tokens;
    };

    static constexpr int64_t kNumBuckets = 1024;
    static constexpr int kBucketBits = 18;  // 32 buckets an octave, and the rest after 32 octaves
    static constexpr uint64_t kIdMask = 0xffffffff;

    // The bits of a positive float increase with it, and the largest weight is 1.
    static uint16_t bucket(float weight) {
        return uint16_t(std::min<uint32_t>((bits_of(1) - bits_of(weight)) >> kBucketBits, kNumBuckets - 1));
    }

    static uint32_t bits_of(float x) {
        uint32_t bits;
        std::memcpy(&bits, &x, 4);
        return bits;
    }

    // Keys ascend where logits descend; among equal logits they ascend with the id.
    static uint64_t sort_key(float logit, int32_t token_id) {
        uint32_t bits = bits_of(logit + 0.f);  // -0 is 0
        uint32_t descending = bits >> 31 ? bits : ~bits & 0x7fffffff;
        return uint64_t(descending) << 32 | uint64_t(token_id);
    }

    template <typename T> void sort(int64_t bucket, const LogitsRow<T> &row) {
        if (bucket == sorted_bucket_) return;
        sorted_bucket_ = bucket;
        sorted_.clear();
        for (int64_t i = 0; i < size_; ++i)
            if (bucket_of_[i] == bucket) sorted_.push_back(sort_key(row[token_ids_[i]], token_ids_[i]));
        std::sort(sorted_.begin(), sorted_.end());
    }

    int64_t size_ = 0;
    std::vector<int32_t> token_ids_;
    std::vector<uint16_t> bucket_of_;
    std::vector<Bucket> buckets_;
    std::vector<uint64_t> sorted_;  // keys of the tokens of `sorted_bucket_`
    int64_t sorted_bucket_ = -1;
};
