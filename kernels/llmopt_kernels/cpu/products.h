// Products with weights as torch stores them: x (m, k) times weight (n, k) transposed, plus a bias.
#pragma once
#include <vector>
#include "numbers.h"

namespace {

// R rows of x times C rows of weights, one sum of sixteen lanes for each output: whatever R and C, an output's additions
// come in the same order, so that it does not depend on what else is computed.
template <int R, int C, typename T>
void product(const T* x, const T* weight, const T* bias, T* out, int64_t k, int64_t n) {
    f32x16 sums[R][C] = {};
    int64_t i = 0;
    for (; i + 16 <= k; i += 16) {
        f32x16 w[C];
        for (int c = 0; c < C; ++c) w[c] = load16(weight + c * k + i);
        for (int r = 0; r < R; ++r) {
            const f32x16 a = load16(x + r * k + i);
            for (int c = 0; c < C; ++c) sums[r][c] += a * w[c];
        }
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) {
            float sum = total(sums[r][c]);
            for (int64_t j = i; j < k; ++j) sum = std::fmaf(load(x[r * k + j]), load(weight[c * k + j]), sum);
            store(out + r * n + c, bias ? sum + load(bias[c]) : sum);
        }
}

// x (m, k) times weight (n, k) transposed: rows that do not depend on each other, bit for bit.
template <typename T>
void linear_rows(const T* x, const T* weight, const T* bias, T* out, int64_t m, int64_t n, int64_t k) {
#ifdef __AVX512F__
    constexpr int SIDE = 4;  // sums that fit in registers
#else
    constexpr int SIDE = 2;
#endif
    const int64_t blocks = (n + SIDE - 1) / SIDE;
#pragma omp parallel for schedule(static) if (m * n * k > 32768)
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t at = block * SIDE;
        const T *w = weight + at * k, *b = bias ? bias + at : nullptr;
        int64_t row = 0;
        if (at + SIDE <= n) {
            for (; row + SIDE <= m; row += SIDE) product<SIDE, SIDE>(x + row * k, w, b, out + row * n + at, k, n);
            for (; row < m; ++row) product<1, SIDE>(x + row * k, w, b, out + row * n + at, k, n);
        }
        for (; row < m; ++row)
            for (int64_t c = 0; at + c < n; ++c)
                product<1, 1>(x + row * k, w + c * k, b ? b + c : nullptr, out + row * n + at + c, k, n);
    }
}

#ifdef __AVX512F__
#define WITH_BF16 __attribute__((target("avx512bf16")))

// Rows i and i + STEP of sixteen exchange what is beside the diagonal in blocks of STEP.
template <int STEP>
inline void exchange(__m512i (&rows)[16]) {
    i32x16 low, high;
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
        low[i] = i & STEP ? 16 + i - STEP : i;
        high[i] = i & STEP ? 16 + i : i + STEP;
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i)
        if (!(i & STEP)) {
            const __m512i a = rows[i], b = rows[i + STEP];
            rows[i] = _mm512_permutex2var_epi32(a, (__m512i)low, b);
            rows[i + STEP] = _mm512_permutex2var_epi32(a, (__m512i)high, b);
        }
}

// Sixteen rows of sixteen become columns.
inline void transpose(__m512i (&rows)[16]) {
    exchange<8>(rows);
    exchange<4>(rows);
    exchange<2>(rows);
    exchange<1>(rows);
}

// Pairs p .. p + 15 of neighbouring columns of up to 16 * V rows of x (m, k), one lane a row: (k / 2, 16 * V).
template <int V>
void pack_pairs(const bf16* x, uint32_t* pairs, int64_t m, int64_t k, int64_t p) {
    const __mmask16 there = (1u << std::min<int64_t>(k / 2 - p, 16)) - 1;
    for (int v = 0; v < V; ++v) {
        __m512i rows[16] = {};
        for (int i = 0; i < 16 && 16 * v + i < m; ++i)
            rows[i] = _mm512_maskz_loadu_epi32(there, x + (16 * v + i) * k + 2 * p);
        transpose(rows);
        for (int i = 0; i < 16 && p + i < k / 2; ++i) _mm512_storeu_si512(pairs + ((p + i) * V + v) * 16, rows[i]);
    }
}

constexpr int WIDE = 12;  // rows of weights whose sums with 32 rows of x stay in registers

// Those rows of x times `count` rows of weights, at most WIDE -> out (m, n) from its column on. `pairs` is x, packed.
template <int V>
WITH_BF16 void tile(const uint32_t* pairs, const bf16* weight, const bf16* bias, bf16* out, int64_t m, int64_t n,
                    int64_t k, int64_t count) {
    const uint32_t* rows[WIDE];
    for (int r = 0; r < WIDE; ++r)
        rows[r] = reinterpret_cast<const uint32_t*>(weight + std::min<int64_t>(r, count - 1) * k);
    __m512 sums[WIDE][V] = {};
    for (int64_t p = 0; p < k / 2; ++p) {
        if (p % 16 == 0)  // a line of every row of the next tile
            for (int r = 0; r < WIDE; ++r) __builtin_prefetch(rows[r] + p + WIDE * k / 2);
        __m512bh x[V];
        for (int v = 0; v < V; ++v) x[v] = (__m512bh)_mm512_loadu_si512(pairs + (p * V + v) * 16);
#pragma GCC unroll 12
        for (int r = 0; r < WIDE; ++r) {
            const __m512bh w = (__m512bh)_mm512_set1_epi32(rows[r][p]);
            for (int v = 0; v < V; ++v) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], x[v], w);
        }
    }
    const __mmask16 wanted = (1u << count) - 1;
    const __m512i more = bias ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(wanted, bias)) : _mm512_setzero_si512();
    for (int v = 0; v < V; ++v) {
        __m512i columns[16] = {};
        for (int r = 0; r < WIDE; ++r) columns[r] = (__m512i)sums[r][v];
        transpose(columns);
        for (int i = 0; i < 16 && 16 * v + i < m; ++i) {
            const __m512 sum = (__m512)columns[i] + (__m512)_mm512_slli_epi32(more, 16);
            _mm256_mask_storeu_epi16(out + (16 * v + i) * n, wanted, (__m256i)_mm512_cvtneps_pbh(sum));
        }
    }
}

// Numbers of 32 bits that `pack` writes for x (m, k).
inline int64_t packed_size(int64_t m, int64_t k) { return (m + 31) / 32 * 16 * k; }

// x (m, k) as `multiply` reads it, 32 rows at a time. By all threads of the region together.
inline void pack(const bf16* x, uint32_t* pairs, int64_t m, int64_t k) {
    const int64_t steps = (k / 2 + 15) / 16;
#pragma omp for schedule(static)
    for (int64_t task = 0; task < (m + 31) / 32 * steps; ++task) {
        const int64_t row = task / steps * 32, left = std::min<int64_t>(m - row, 32);
        (left > 16 ? pack_pairs<2> : pack_pairs<1>)(x + row * k, pairs + row * k / 2, left, k, task % steps * 16);
    }
}

// x, packed, times weight (n, k) transposed. By all threads of the region together. An output's additions come in the
// same order whatever m is.
inline void multiply(const uint32_t* pairs, const bf16* weight, const bf16* bias, bf16* out, int64_t m, int64_t n,
                     int64_t k) {
#pragma omp for schedule(static)
    for (int64_t t = 0; t < (n + WIDE - 1) / WIDE; ++t)
        for (int64_t row = 0; row < m; row += 32) {
            const int64_t at = t * WIDE;
            (m - row > 16 ? tile<2> : tile<1>)(pairs + row * k / 2, weight + at * k, bias ? bias + at : nullptr,
                                               out + row * n + at, std::min<int64_t>(m - row, 32), n, k,
                                               std::min<int64_t>(n - at, WIDE));
        }
}

constexpr int64_t FEW = 8;  // rows of x for which a product for each output is faster: packed, most lanes are empty
constexpr int SIDE_BF16 = 4;

// R rows of x times `count` rows of weights, at most SIDE_BF16 -> out (R, n) from its column on. An output's additions
// come in the same order whatever R and `count`. Unrolled: sums that are indexed would not stay in registers.
template <int R>
WITH_BF16 void dots(const bf16* x, const bf16* weight, const bf16* bias, bf16* out, int64_t n, int64_t k,
                    int64_t count) {
    constexpr int C = SIDE_BF16;
    const bf16* rows[C];
    for (int c = 0; c < C; ++c) rows[c] = weight + std::min<int64_t>(c, count - 1) * k;
    __m512 sums[R][C] = {};
    for (int64_t i = 0; i < k; i += 32) {
        const __mmask32 there = k - i < 32 ? (1u << (k - i)) - 1 : ~0u;
        __m512bh w[C];
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) w[c] = (__m512bh)_mm512_maskz_loadu_epi16(there, rows[c] + i);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const __m512bh a = (__m512bh)_mm512_maskz_loadu_epi16(there, x + r * k + i);
#pragma GCC unroll 4
            for (int c = 0; c < C; ++c) sums[r][c] = _mm512_dpbf16_ps(sums[r][c], a, w[c]);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
        const f32x16 row[C] = {(f32x16)sums[r][0], (f32x16)sums[r][1], (f32x16)sums[r][2], (f32x16)sums[r][3]};
        const f32x4 found = totals(row);
        for (int c = 0; c < count; ++c) store(out + r * n + c, bias ? found[c] + load(bias[c]) : found[c]);
    }
}

// At most FEW rows x (m, k), as it lies, times weight (n, k) transposed. By all threads of the region together.
inline void multiply_few(const bf16* x, const bf16* weight, const bf16* bias, bf16* out, int64_t m, int64_t n,
                         int64_t k) {
#pragma omp for schedule(static)
    for (int64_t at = 0; at < n; at += SIDE_BF16) {
        const bf16 *w = weight + at * k, *b = bias ? bias + at : nullptr;
        const int64_t count = std::min<int64_t>(n - at, SIDE_BF16);
        int64_t row = 0;
        for (; row + 4 <= m; row += 4) dots<4>(x + row * k, w, b, out + row * n + at, n, k, count);
        for (; row + 2 <= m; row += 2) dots<2>(x + row * k, w, b, out + row * n + at, n, k, count);
        if (row < m) dots<1>(x + row * k, w, b, out + row * n + at, n, k, count);
    }
}

// x (m, k) times weight (n, k) transposed, for tens of rows: weights are read as they lie. k is even. `pairs` has
// packed_size(m, k) numbers. By all threads of the region together.
inline void product_of(const bf16* x, uint32_t* pairs, const bf16* weight, const bf16* bias, bf16* out, int64_t m,
                       int64_t n, int64_t k) {
    if (m <= FEW) return multiply_few(x, weight, bias, out, m, n, k);
    pack(x, pairs, m, k);
    multiply(pairs, weight, bias, out, m, n, k);
}

inline void linear_bf16(const bf16* x, const bf16* weight, const bf16* bias, bf16* out, int64_t m, int64_t n,
                        int64_t k) {
    std::vector<uint32_t> pairs(m > FEW ? packed_size(m, k) : 0);
#pragma omp parallel if (m * n * k > 32768)
    product_of(x, pairs.data(), weight, bias, out, m, n, k);
}
#endif

}  // namespace
