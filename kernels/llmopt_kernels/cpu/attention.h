// Attention over the paged cache.
#pragma once
#include <vector>
#include "numbers.h"

namespace {

struct Shape {
    int64_t queries, heads, kv_heads, dim, value_dim, block_size, table_width, query_stride, window, chunk;
};

// The widest vector that the machine has: GCC cuts longer ones up by way of memory.
#ifdef __AVX512F__
typedef f32x16 lanes;
template <typename C>
inline lanes load_lanes(const C* at) { return load16(at); }
template <typename T>
inline void store_lanes(T* at, lanes x) { store16(at, x); }
#else
typedef f32x8 lanes;
typedef int32_t i32x8 __attribute__((vector_size(32)));
typedef uint16_t u16x8 __attribute__((vector_size(16)));
inline lanes load_lanes(const float* at) {
    lanes value;
    std::memcpy(&value, at, sizeof value);
    return value;
}
inline lanes load_lanes(const bf16* at) {
    u16x8 bits;
    std::memcpy(&bits, at, sizeof bits);
    const i32x8 wide = __builtin_convertvector(bits, i32x8) << 16;
    lanes value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
}
template <typename C>
inline lanes load_lanes(const C* at) {
    lanes value;
    for (int i = 0; i < 8; ++i) value[i] = load(at[i]);
    return value;
}
template <typename T>
inline void store_lanes(T* at, lanes x) {
    for (int i = 0; i < 8; ++i) store(at + i, x[i]);
}
#endif
constexpr int64_t LANES = sizeof(lanes) / sizeof(float);
constexpr int64_t KEYS = 4, AHEAD = 12;  // keys that are multiplied at once; keys to fetch before they are needed
constexpr int HEADS = 2;                 // with so many keys, or four vectors of a value: their sums fit in registers

template <typename C>
inline void prefetch(const C* at, int64_t n) {
    for (int64_t i = 0; i < n; i += 64 / sizeof(C)) __builtin_prefetch(at + i);
}

// G rows of q, float32, times the keys at `places` (n, a multiple of KEYS) -> p (G, n). Those that come soon are
// fetched, for pages lie anywhere.
template <int G, typename C>
inline void score(const float* q, const C* k, const float* scales, const int64_t* places, int64_t n, int64_t dim,
                  float* p) {
    for (int64_t t = 0; t < n; t += KEYS) {
        const C* keys[KEYS];
        for (int j = 0; j < KEYS; ++j) {
            keys[j] = k + places[t + j] * dim;
            prefetch(k + places[std::min(t + AHEAD + j, n - 1)] * dim, dim);
        }
        lanes sums[G][KEYS] = {};
        int64_t i = 0;
        for (; i + LANES <= dim; i += LANES)
            for (int j = 0; j < KEYS; ++j) {
                const lanes x = load_lanes(keys[j] + i);
                for (int g = 0; g < G; ++g) sums[g][j] += load_lanes(q + g * dim + i) * x;
            }
        for (int g = 0; g < G; ++g) {
            f32x4 found = totals(sums[g]);
            for (int64_t d = i; d < dim; ++d)
                found += q[g * dim + d] * f32x4{load(keys[0][d]), load(keys[1][d]), load(keys[2][d]), load(keys[3][d])};
            if (scales)
                for (int j = 0; j < KEYS; ++j) found[j] *= scales[places[t + j]];
            std::memcpy(p + g * n + t, &found, sizeof found);
        }
    }
}

// Scores of one query and head, float32 (n), to weights that sum up to 1 together with the sink's.
inline void soften(float* p, int64_t n, float softcap, const float* sink) {
    if (softcap > 0)
        for (int64_t t = 0; t < n; ++t) p[t] = softcap * std::tanh(p[t] / softcap);
    float top = sink ? *sink : -INFINITY, total = 0;
#pragma omp simd reduction(max : top)
    for (int64_t t = 0; t < n; ++t) top = std::max(top, p[t]);
#pragma omp simd reduction(+ : total)
    for (int64_t t = 0; t < n; ++t) total += p[t] = exp_fast(p[t] - top);
    if (sink) total += exp_fast(*sink - top);
    const float inverse = 1.0f / total;
#pragma omp simd
    for (int64_t t = 0; t < n; ++t) p[t] *= inverse;
}

// V vectors of columns of the values at the first n `places`, weighted by G rows of weights that are `apart`.
template <int G, int V, typename T, typename C>
inline void weigh(const float* p, int64_t apart, const C* v, const int64_t* places, int64_t n, int64_t dim, T* out) {
    lanes sums[G][V] = {};
    for (int64_t t = 0; t < n; ++t) {
        prefetch(v + places[std::min(t + AHEAD, n - 1)] * dim, LANES * V);
        for (int c = 0; c < V; ++c) {
            const lanes x = load_lanes(v + places[t] * dim + LANES * c);
            for (int g = 0; g < G; ++g) sums[g][c] += p[g * apart + t] * x;
        }
    }
    for (int g = 0; g < G; ++g)
        for (int c = 0; c < V; ++c) store_lanes(out + g * dim + LANES * c, sums[g][c]);
}

// All columns of it -> out (G, dim).
template <int G, typename T, typename C>
inline void mix(const float* p, int64_t apart, const C* v, const int64_t* places, int64_t n, int64_t dim, T* out) {
    int64_t d = 0;
    for (; d + 4 * LANES <= dim; d += 4 * LANES) weigh<G, 4>(p, apart, v + d, places, n, dim, out + d);
    for (; d + LANES <= dim; d += LANES) weigh<G, 1>(p, apart, v + d, places, n, dim, out + d);
    for (; d < dim; ++d)
        for (int g = 0; g < G; ++g) {
            float sum = 0;
            for (int64_t t = 0; t < n; ++t) sum += p[g * apart + t] * load(v[places[t] * dim + d]);
            store(out + g * dim + d, sum);
        }
}

// What a task works with: it grows to the longest request, and is not allocated anew for each.
struct Scratch {
    std::vector<float> q, p;
    std::vector<int64_t> places;
};

// Where the tokens begin..end of one KV head lie, in heads from the cache's start; the last one fills up to KEYS.
inline void find_places(std::vector<int64_t>& places, const int64_t* table, int64_t begin, int64_t end,
                        int64_t kv_head, const Shape& s) {
    places.resize((end - begin + KEYS - 1) / KEYS * KEYS);
    for (int64_t t = begin; t < end;) {
        const int64_t offset = t % s.block_size, stop = std::min(end, t - offset + s.block_size);
        const int64_t slot = table[t / s.block_size] * s.block_size + offset;
        for (int64_t i = 0; t < stop; ++i, ++t) places[t - begin] = (slot + i) * s.kv_heads + kv_head;
    }
    std::fill(places.begin() + (end - begin), places.end(), places[end - begin - 1]);
}

// One query token with the heads of one KV head: each key and value is read once for HEADS of them.
template <typename T, typename C>
void attend(const T* query, const C* k, const C* v, const float* k_scales, const float* v_scales, const float* sinks,
            T* out, const int64_t* table, int64_t end, int64_t kv_head, const Shape& s, float scale, float softcap,
            Scratch& scratch) {
    const int64_t group = s.heads / s.kv_heads, first = kv_head * group;
    const int64_t begin = std::max(s.window > 0 ? std::max<int64_t>(0, end - s.window) : 0,
                                   s.chunk > 0 ? (end - 1) / s.chunk * s.chunk : 0);
    find_places(scratch.places, table, begin, end, kv_head, s);
    const int64_t seen = end - begin, padded = scratch.places.size();
    scratch.q.resize(group * s.dim);
    scratch.p.resize(group * padded);
    const int64_t* places = scratch.places.data();
    float *q = scratch.q.data(), *p = scratch.p.data();
    for (int64_t i = 0; i < group * s.dim; ++i) q[i] = load(query[first * s.dim + i]) * scale;
    int64_t g = 0;
    for (; g + HEADS <= group; g += HEADS) score<HEADS>(q + g * s.dim, k, k_scales, places, padded, s.dim, p + g * padded);
    for (; g < group; ++g) score<1>(q + g * s.dim, k, k_scales, places, padded, s.dim, p + g * padded);
    for (g = 0; g < group; ++g) {
        soften(p + g * padded, seen, softcap, sinks ? sinks + first + g : nullptr);
        if (v_scales)
            for (int64_t t = 0; t < seen; ++t) p[g * padded + t] *= v_scales[places[t]];
    }
    T* to = out + first * s.value_dim;
    for (g = 0; g + HEADS <= group; g += HEADS)
        mix<HEADS>(p + g * padded, padded, v, places, seen, s.value_dim, to + g * s.value_dim);
    for (; g < group; ++g) mix<1>(p + g * padded, padded, v, places, seen, s.value_dim, to + g * s.value_dim);
}

// query rows[b]..rows[b]+queries of request b; out (T, heads, value_dim); tables (requests, table_width) of block numbers.
// k and v in the dtype of the query, or in 8-bit codes with a scale for each slot and head; `codes` is what those mean.
// By all threads of the region together.
template <typename T, typename C>
void attend_all(const T* query, const C* k, const C* v, const float* k_scales, const float* v_scales,
                const float* codes, const float* sinks, T* out, const int64_t* rows, const int64_t* tables,
                const int64_t* lengths, int64_t requests, const Shape& s, float scale, float softcap) {
    const int64_t each = s.queries * s.kv_heads;
    Scratch scratch;
    float8_table = codes;
#pragma omp for schedule(dynamic, 4)
    for (int64_t task = 0; task < requests * each; ++task) {
        const int64_t b = task / each, row = task % each / s.kv_heads, end = lengths[b] - s.queries + row + 1;
        attend(query + (rows[b] + row) * s.query_stride, k, v, k_scales, v_scales, sinks,
               out + (rows[b] + row) * s.heads * s.value_dim, tables + b * s.table_width, end, task % s.kv_heads, s,
               scale, softcap, scratch);
    }
}

template <typename T, typename C>
void paged_attention(const T* query, const C* k, const C* v, const float* k_scales, const float* v_scales,
                     const float* codes, const float* sinks, T* out, const int64_t* rows, const int64_t* tables,
                     const int64_t* lengths, int64_t requests, const int64_t* shape, float scale, float softcap) {
    const Shape s{shape[0], shape[1], shape[2], shape[3], shape[4], shape[5], shape[6], shape[7], shape[8], shape[9]};
#pragma omp parallel if (requests * s.queries * s.kv_heads > 1)
    attend_all(query, k, v, k_scales, v_scales, codes, sinks, out, rows, tables, lengths, requests, s, scale, softcap);
}

}  // namespace
