// What is done to each row or head alone: norm, rotary angles, the gate of an MLP, the likeliest token, a place in the cache.
#pragma once
#include "numbers.h"

namespace {

template <typename T>
inline void norm_row(const T* x, const T* weight, T* out, int64_t n, float eps) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) sum += load(x[i]) * load(x[i]);
    const float scale = 1.0f / std::sqrt(sum / n + eps);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) store(out + i, load(weight[i]) * rounded(load(x[i]) * scale, weight));
}

template <typename T>
void rms_norm(const T* x, const T* weight, T* out, int64_t rows, int64_t n, float eps) {
#pragma omp parallel for if (rows * n > 65536)
    for (int64_t row = 0; row < rows; ++row) norm_row(x + row * n, weight, out + row * n, n, eps);
}

// One token's heads x (heads, dim) in place; cos and sin (dim).
template <typename T>
inline void turn_heads(T* x, const T* cos, const T* sin, int64_t heads, int64_t dim) {
    const int64_t half = dim / 2;
    for (int64_t h = 0; h < heads; ++h) {
        T *low = x + h * dim, *high = low + half;
#pragma omp simd
        for (int64_t i = 0; i < half; ++i) {
            const float a = load(low[i]), b = load(high[i]);
            // Each product is rounded as torch rounds it, so that 16-bit results agree with the reference.
            const float ac = rounded(a * load(cos[i]), x), bs = rounded(b * load(sin[i]), x);
            const float bc = rounded(b * load(cos[half + i]), x), as = rounded(a * load(sin[half + i]), x);
            store(low + i, ac - bs);
            store(high + i, bc + as);
        }
    }
}

// A token's heads are `stride` apart from the next token's.
template <typename T>
void rotary(T* x, const T* cos, const T* sin, int64_t tokens, int64_t heads, int64_t dim, int64_t stride) {
    for (int64_t t = 0; t < tokens; ++t) turn_heads(x + t * stride, cos + t * dim, sin + t * dim, heads, dim);
}

template <typename T>
inline void silu_mul_row(const T* gate, const T* up, T* out, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        const float g = load(gate[i]);
        store(out + i, rounded(g / (1.0f + exp_fast(std::min(-g, 88.0f))), up) * load(up[i]));
    }
}

template <typename T>
void silu_mul(const T* gate_up, T* out, int64_t rows, int64_t n) {
#pragma omp parallel for if (rows * n > 65536)
    for (int64_t row = 0; row < rows; ++row) {
        const T* gate = gate_up + row * 2 * n;
        silu_mul_row(gate, gate + n, out + row * n, n);
    }
}

// The first of the largest of x (n). If some are no number, any.
template <typename T>
inline int64_t first_top(const T* x, int64_t n) {
    float top = -INFINITY;
#pragma omp simd reduction(max : top)
    for (int64_t i = 0; i < n; ++i) top = std::max(top, load(x[i]));
    for (int64_t start = 0; start < n; start += 256) {
        const int64_t end = std::min(start + 256, n);
        int found = 0;
#pragma omp simd reduction(| : found)
        for (int64_t i = start; i < end; ++i) found |= load(x[i]) == top;
        for (int64_t i = start; found && i < end; ++i)
            if (load(x[i]) == top) return i;
    }
    return 0;
}

template <typename T>
void argmax(const T* x, int64_t* out, int64_t rows, int64_t n) {
#pragma omp parallel for if (rows * n > 65536)
    for (int64_t row = 0; row < rows; ++row) out[row] = first_top(x + row * n, n);
}

template <typename T>
void store_rows(const T* from, T* cache, const int64_t* slots, int64_t tokens, int64_t width, int64_t stride) {
    for (int64_t t = 0; t < tokens; ++t) std::memcpy(cache + slots[t] * width, from + t * stride, width * sizeof(T));
}

// Each head of each token in int8, its largest value 127, with the scale that undoes it: reference.quantize_heads.
template <typename T>
void store_int8(const T* from, int8_t* cache, float* scales, const int64_t* slots, int64_t tokens, int64_t heads,
                int64_t dim, int64_t stride) {
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t h = 0; h < heads; ++h) {
            const T* x = from + t * stride + h * dim;
            int8_t* to = cache + (slots[t] * heads + h) * dim;
            float top = 0;
#pragma omp simd reduction(max : top)
            for (int64_t d = 0; d < dim; ++d) top = std::max(top, std::fabs(load(x[d])));
            const float scale = std::max(top / 127.0f, 1e-12f);
            scales[slots[t] * heads + h] = scale;
#pragma omp simd
            for (int64_t d = 0; d < dim; ++d) to[d] = static_cast<int8_t>(std::nearbyint(load(x[d]) / scale));
        }
}

}  // namespace
