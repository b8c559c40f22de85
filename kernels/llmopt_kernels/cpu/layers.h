// Whole decoder layers for tens of rows: what lies between their products costs less than handing it over and back.
#pragma once
#include <vector>

#include "attention.h"
#include "elements.h"
#include "products.h"

#ifdef __AVX512F__
namespace {

// What all layers of a step share. x and out (tokens, hidden); cos and sin (tokens, dim); slots (tokens) for new keys
// and values; rows, tables, lengths as in attend_all. In the order of cpu/layers.py, as is Layer.
struct Step {
    const bf16 *x, *cos, *sin;
    bf16* out;
    const int64_t *slots, *rows, *tables, *lengths;
    int64_t tokens, requests, queries, block_size, table_width;
};

// One layer: weights as in layers.py, null for what it lacks, and its cache.
struct Layer {
    const bf16 *norm, *qkv, *qkv_bias, *q_norm, *k_norm, *o, *o_bias;
    const bf16 *mlp_norm, *gate_up, *gate_up_bias, *down, *down_bias;
    bf16 *k, *v;
    int64_t hidden, heads, kv_heads, dim, inner, window, chunk;
    double scale, softcap, eps, head_eps, mlp_eps;

    int64_t qkv_width() const { return (heads + 2 * kv_heads) * dim; }
    int64_t mixed_width() const { return heads * dim; }
};

// Room for what lies between the products. It grows to the largest layer, and is kept by the calling thread: new pages
// from the system for every step would cost more than a layer.
struct Arena {
    std::vector<bf16> normed, qkv, mixed, added, gate_up, gated;
    std::vector<uint32_t> pairs;

    void fit(const Layer& l, int64_t tokens) {
        grow(normed, tokens * l.hidden);
        grow(added, tokens * l.hidden);
        grow(qkv, tokens * l.qkv_width());
        grow(mixed, tokens * l.mixed_width());
        grow(gate_up, tokens * 2 * l.inner);
        grow(gated, tokens * l.inner);
        grow(pairs, packed_size(tokens, std::max({l.hidden, l.mixed_width(), l.inner})));
    }
    template <typename V>
    static void grow(V& buffer, int64_t size) {
        if (static_cast<int64_t>(buffer.size()) < size) buffer.resize(size);
    }
};

// One token's q, k and v (heads + 2 * kv_heads, dim): norms and angles, then k and v into their slot of the cache.
inline void place_heads(const Step& step, const Layer& l, bf16* qkv, int64_t token) {
    const int64_t width = l.kv_heads * l.dim, slot = step.slots[token] * width;
    bf16 *k = qkv + l.heads * l.dim, *v = k + width;
    if (l.q_norm)
        for (int64_t h = 0; h < l.heads + l.kv_heads; ++h)
            norm_row(qkv + h * l.dim, h < l.heads ? l.q_norm : l.k_norm, qkv + h * l.dim, l.dim, l.head_eps);
    turn_heads(qkv, step.cos + token * l.dim, step.sin + token * l.dim, l.heads + l.kv_heads, l.dim);
    std::memcpy(l.k + slot, k, width * sizeof(bf16));
    std::memcpy(l.v + slot, v, width * sizeof(bf16));
}

inline void add_row(const bf16* x, const bf16* y, bf16* out, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) store(out + i, load(x[i]) + load(y[i]));
}

// Attention, added to x (tokens, hidden), into step.out. By all threads of the region together, as what follows.
inline void run_attention(const Step& step, const Layer& l, const bf16* x, Arena& a) {
    const int64_t t = step.tokens, n = l.hidden, width = l.qkv_width(), mixed_width = l.mixed_width();
    bf16 *normed = a.normed.data(), *qkv = a.qkv.data(), *mixed = a.mixed.data(), *added = a.added.data();
    uint32_t* pairs = a.pairs.data();
#pragma omp for schedule(static)
    for (int64_t row = 0; row < t; ++row) norm_row(x + row * n, l.norm, normed + row * n, n, l.eps);
    product_of(normed, pairs, l.qkv, l.qkv_bias, qkv, t, width, n);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < t; ++row) place_heads(step, l, qkv + row * width, row);
    const Shape shape{step.queries, l.heads, l.kv_heads, l.dim, l.dim, step.block_size, step.table_width, width, l.window, l.chunk};
    attend_all<bf16, bf16>(qkv, l.k, l.v, nullptr, nullptr, nullptr, nullptr, mixed, step.rows, step.tables,
                           step.lengths, step.requests, shape, l.scale, l.softcap);
    product_of(mixed, pairs, l.o, l.o_bias, added, t, n, mixed_width);
#pragma omp for schedule(static) nowait  // the norm that comes next gives each thread the same rows
    for (int64_t row = 0; row < t; ++row) add_row(x + row * n, added + row * n, step.out + row * n, n);
}

// The MLP, added to step.out.
inline void run_mlp(const Step& step, const Layer& l, Arena& a) {
    const int64_t t = step.tokens, n = l.hidden, inner = l.inner;
    bf16 *normed = a.normed.data(), *gate_up = a.gate_up.data(), *gated = a.gated.data(), *added = a.added.data();
    uint32_t* pairs = a.pairs.data();
#pragma omp for schedule(static)
    for (int64_t row = 0; row < t; ++row) norm_row(step.out + row * n, l.mlp_norm, normed + row * n, n, l.mlp_eps);
    product_of(normed, pairs, l.gate_up, l.gate_up_bias, gate_up, t, 2 * inner, n);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < t; ++row) {
        const bf16* gate = gate_up + row * 2 * inner;
        silu_mul_row(gate, gate + inner, gated + row * inner, inner);
    }
    product_of(gated, pairs, l.down, l.down_bias, added, t, n, inner);
#pragma omp for schedule(static) nowait  // the norm that comes next gives each thread the same rows
    for (int64_t row = 0; row < t; ++row) add_row(step.out + row * n, added + row * n, step.out + row * n, n);
}

void decoder_layers(const Step& step, const Layer* layers, int64_t count) {
    static thread_local Arena kept;
    Arena& arena = kept;  // that of this thread, for all of the region
    for (int64_t i = 0; i < count; ++i) arena.fit(layers[i], step.tokens);
#pragma omp parallel
    for (int64_t i = 0; i < count; ++i) {
        run_attention(step, layers[i], i ? step.out : step.x, arena);
        run_mlp(step, layers[i], arena);
    }
}

}  // namespace
#endif
