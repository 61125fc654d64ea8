// Attention of ingine/engine/kernels/native/src/attention.cpp beside the textbook formula, for CPUs that only an emulator has
// here: no torch and no Python. Prints each format of KV that is right; the first wrong one is status 1.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <vector>

#include "vec.h"

// As in attention.cpp.
struct Item {
    int32_t seq, first_row, end_row, first_segment, end_segment, first_partial;
};
struct Step {
    const int64_t *slot_mapping;
    const int32_t *block_tables, *query_start_loc, *seq_lens;
    Item *items;
    float *partials;
    int32_t num_seqs, block_table_stride, num_heads, num_kv_heads, head_dim, block_size;
    int32_t sliding_window, dtype, kv_format, num_items, num_partials, state_size;
};

extern "C" {
void ingine_attention_plan(Step *);
int64_t ingine_kv_block_bytes(int64_t, int64_t, int64_t, int32_t, int32_t);
void ingine_attention(const Step *, const void *, int64_t, const void *, int64_t, const void *, int64_t,
                      const void *, const void *, void *, void *, float);
}

namespace {

constexpr int kTokens = 300, kHeads = 6, kKVHeads = 2, kHeadDim = 80, kBlockSize = 16;
constexpr int kQuery = kHeads * kHeadDim, kKV = kKVHeads * kHeadDim;
constexpr float kScale = 0.1f;

struct Sequence {
    std::vector<float> query, key, value;
    std::vector<int64_t> slots;
    std::vector<int32_t> blocks;
};

std::vector<float> numbers(size_t count) {
    static uint32_t state = 1;
    std::vector<float> made(count);
    for (float &x : made) {
        state = state * 1664525 + 1013904223;
        x = int32_t(state) / float(1u << 31);
    }
    return made;
}

// Attention of tokens `first` to `end`, whose predecessors are in `memory`.
void attend(const Sequence &sequence, int32_t format, int32_t first, int32_t end, std::vector<char> &memory,
            float *output) {
    const int32_t starts[] = {0, end - first};
    Step step{sequence.slots.data() + first, sequence.blocks.data(), starts, &end, nullptr, nullptr, 1,
              int32_t(sequence.blocks.size()), kHeads, kKVHeads, kHeadDim, kBlockSize, 0, kFloat32, format,
              0, 0, 0};
    ingine_attention_plan(&step);
    std::vector<Item> items(step.num_items);
    std::vector<float> partials(size_t(kKVHeads) * step.num_partials * step.state_size);
    step.items = items.data(), step.partials = partials.data();
    ingine_attention_plan(&step);
    ingine_attention(&step, &sequence.query[first * kQuery], kQuery, &sequence.key[first * kKV], kKV,
                     &sequence.value[first * kKV], kKV, nullptr, nullptr, memory.data(), output + first * kQuery,
                     kScale);
}

double exact(const Sequence &sequence, int token, int head, int dim) {
    const float *query = &sequence.query[token * kQuery + head * kHeadDim];
    double total = 0, attended = 0;
    for (int t = 0; t <= token; ++t) {
        const int64_t row = t * kKV + head / (kHeads / kKVHeads) * kHeadDim;
        double score = 0;
        for (int d = 0; d < kHeadDim; ++d) score += double(query[d]) * sequence.key[row + d];
        const double weight = std::exp(score * kScale);
        total += weight, attended += weight * sequence.value[row + dim];
    }
    return attended / total;
}

// The largest error of a sequence that is computed at once. Infinite if its numbers are others token by token.
double worst_error(const Sequence &sequence, int32_t format) {
    const int64_t block_bytes = ingine_kv_block_bytes(kBlockSize, kKVHeads, kHeadDim, kFloat32, format);
    std::vector<char> memory(sequence.blocks.size() * block_bytes, char(0xff));
    std::vector<float> whole(kTokens * kQuery), parts(kTokens * kQuery);
    attend(sequence, format, 0, kTokens, memory, whole.data());
    std::fill(memory.begin(), memory.end(), char(0xff));
    attend(sequence, format, 0, 37, memory, parts.data());
    for (int token = 37; token < kTokens; ++token)
        attend(sequence, format, token, token + 1, memory, parts.data());
    if (std::memcmp(whole.data(), parts.data(), whole.size() * sizeof(float))) return INFINITY;
    double worst = 0;
    for (int token = 0; token < kTokens; token += 13)
        for (int head = 0; head < kHeads; ++head)
            for (int dim = 0; dim < kHeadDim; dim += 7) {
                const float ours = whole[token * kQuery + head * kHeadDim + dim];
                const double error = ours - exact(sequence, token, head, dim);
                if (!(std::fabs(error) <= worst)) worst = std::fabs(error);  // so that a NaN is not lost
            }
    return worst;
}

}  // namespace

int main() {
    Sequence sequence{numbers(kTokens * kQuery), numbers(kTokens * kKV), numbers(kTokens * kKV), {}, {}};
    const int num_blocks = (kTokens + kBlockSize - 1) / kBlockSize;
    for (int i = 0; i < num_blocks; ++i) sequence.blocks.push_back(num_blocks - 1 - i);
    for (int t = 0; t < kTokens; ++t)
        sequence.slots.push_back(int64_t(sequence.blocks[t / kBlockSize]) * kBlockSize + t % kBlockSize);
    const char *names[] = {"float32", "int8", "int4"};
    const double tolerances[] = {1e-5, 0.02, 0.25};  // of numbers up to 1: what rounding them may cost
    for (int32_t format = 0; format < 3; ++format) {
        const double error = worst_error(sequence, format);
        if (!(error < tolerances[format])) {
            std::printf("wrong: %s, by %g\n", names[format], error);
            return 1;
        }
        std::printf("%s\n", names[format]);
    }
}
