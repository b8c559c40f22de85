// The CPU ops. A plain C interface (pointers and sizes), compiled once per instruction set; reference.py is the
// specification. Rows are split over the OpenMP threads of whichever runtime torch has already loaded: a second runtime
// in the process would spin against it.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef __F16C__
#include <immintrin.h>
#endif

namespace {

struct bf16 {
    uint16_t bits;
};

inline float load(float x) { return x; }
inline float load(bf16 x) {
    uint32_t wide = static_cast<uint32_t>(x.bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}

inline void store(float* at, float x) { *at = x; }
inline void store(bf16* at, float x) {  // round to nearest even, as torch does
    uint32_t wide;
    std::memcpy(&wide, &x, 4);
    at->bits = static_cast<uint16_t>((wide + 0x7fff + ((wide >> 16) & 1)) >> 16);
}

inline float rounded(float x, const float*) { return x; }
inline float rounded(float x, const bf16*) {
    bf16 narrow;
    store(&narrow, x);
    return load(narrow);
}

// exp(x) for x <= 88: 2^n * p(f) with a degree-6 polynomial, within 2 ulp; written so that it vectorizes.
inline float exp_fast(float x) {
    x = std::max(x, -87.0f);
    float n = std::nearbyint(x * 1.44269504f);
    float f = std::fmaf(n, -0.693359375f, x);
    f = std::fmaf(n, 2.12194440e-4f, f);
    float p = 1.9875691500e-4f;
    p = std::fmaf(p, f, 1.3981999507e-3f);
    p = std::fmaf(p, f, 8.3334519073e-3f);
    p = std::fmaf(p, f, 4.1665795894e-2f);
    p = std::fmaf(p, f, 1.6666665459e-1f);
    p = std::fmaf(p, f, 5.0000001201e-1f);
    p = std::fmaf(p * f, f, f + 1.0f);
    int32_t power = (static_cast<int32_t>(n) + 127) << 23;
    float scale;
    std::memcpy(&scale, &power, 4);
    return p * scale;
}

// Sixteen at a time, in the vector extensions of GCC and Clang: loops with several sums do not stay in registers.
typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));

inline f32x16 load16(const float* at) {
    f32x16 value;
    std::memcpy(&value, at, sizeof value);
    return value;
}
inline f32x16 load16(const bf16* at) {
#ifdef __AVX512F__  // GCC widens half a vector at a time
    const i32x16 wide = (i32x16)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at))) << 16;
#else
    u16x16 bits;
    std::memcpy(&bits, at, sizeof bits);
    const i32x16 wide = __builtin_convertvector(bits, i32x16) << 16;
#endif
    f32x16 value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
}
inline void store16(float* at, f32x16 x) { std::memcpy(at, &x, sizeof x); }
inline void store16(bf16* at, f32x16 x) {
    i32x16 wide;
    std::memcpy(&wide, &x, sizeof wide);
    const u16x16 bits = __builtin_convertvector((wide + 0x7fff + (wide >> 16 & 1)) >> 16, u16x16);
    std::memcpy(at, &bits, sizeof bits);
}
inline f32x16 floats(i32x16 x) { return __builtin_convertvector(x, f32x16); }
typedef float f32x8 __attribute__((vector_size(32)));
typedef float f32x4 __attribute__((vector_size(16)));
inline f32x4 folded(f32x8 x) {
    f32x4 fours[2];
    std::memcpy(fours, &x, sizeof x);
    return fours[0] + fours[1];
}
inline f32x4 folded(f32x16 x) {
    f32x8 eights[2];
    std::memcpy(eights, &x, sizeof x);
    return folded(eights[0] + eights[1]);
}
// In halves: one after the other, each addition would wait for the one before.
inline float total(f32x16 x) {
    const f32x4 four = folded(x);
    return (four[0] + four[2]) + (four[1] + four[3]);
}
template <typename V>
inline f32x4 totals(const V (&x)[4]) {
    const f32x4 a = folded(x[0]), b = folded(x[1]), c = folded(x[2]), d = folded(x[3]);
    const f32x4 ab = f32x4{a[0], b[0], a[1], b[1]} + f32x4{a[2], b[2], a[3], b[3]};
    const f32x4 cd = f32x4{c[0], d[0], c[1], d[1]} + f32x4{c[2], d[2], c[3], d[3]};
    return f32x4{ab[0], ab[1], cd[0], cd[1]} + f32x4{ab[2], ab[3], cd[2], cd[3]};
}

// 8-bit codes of a quantized cache. An 8-bit float's value is looked up; its scale is applied to what is summed.
struct q8 {
    int8_t code;
};
struct f8 {
    uint8_t code;
};
thread_local const float* float8_table = nullptr;

inline float load(q8 x) { return x.code; }
inline float load(f8 x) { return float8_table[x.code]; }
inline f32x16 load16(const q8* at) {
#ifdef __AVX512F__
    return floats((i32x16)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at))));
#else
    typedef int8_t i8x16 __attribute__((vector_size(16)));
    i8x16 codes;
    std::memcpy(&codes, at, sizeof codes);
    return floats(__builtin_convertvector(codes, i32x16));
#endif
}
inline f32x16 load16(const f8* at) {
    const float* table = float8_table;
    f32x16 value;
    for (int i = 0; i < 16; ++i) value[i] = table[at[i].code];
    return value;
}

template <typename T>
float dot(const float* a, const T* b, int64_t n) {
    f32x16 s0{}, s1{}, s2{}, s3{};  // four sums: a single one would wait for its own last addition
    int64_t i = 0;
    for (; i + 64 <= n; i += 64) {
        s0 += load16(a + i) * load16(b + i);
        s1 += load16(a + i + 16) * load16(b + i + 16);
        s2 += load16(a + i + 32) * load16(b + i + 32);
        s3 += load16(a + i + 48) * load16(b + i + 48);
    }
    for (; i + 16 <= n; i += 16) s0 += load16(a + i) * load16(b + i);
    float sum = total((s0 + s1) + (s2 + s3));
    for (; i < n; ++i) sum += a[i] * load(b[i]);
    return sum;
}

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

// Up to 16 * V rows of x (m, k) as vectors of pairs of neighbouring columns, one lane a row: (k / 2, 16 * V).
template <int V>
void pack_pairs(const bf16* x, uint32_t* pairs, int64_t m, int64_t k) {
    for (int64_t p = 0; p < k / 2; p += 16)
        for (int v = 0; v < V; ++v) {
            const __mmask16 there = (1u << std::min<int64_t>(k / 2 - p, 16)) - 1;
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

// x (m, k) times weight (n, k) transposed, for tens of rows: what is packed is x, weights are read as they lie. An
// output's additions come in the same order whatever m is. k is even.
void linear_bf16(const bf16* x, const bf16* weight, const bf16* bias, bf16* out, int64_t m, int64_t n, int64_t k) {
    std::vector<uint32_t> packed((m + 31) / 32 * 16 * k);
    uint32_t* pairs = packed.data();
    for (int64_t row = 0; row < m; row += 32)
        (m - row > 16 ? pack_pairs<2> : pack_pairs<1>)(x + row * k, pairs + row * k / 2, std::min<int64_t>(m - row, 32), k);
    const int64_t tiles = (n + WIDE - 1) / WIDE;
#pragma omp parallel for schedule(static) if (m * n * k > 32768)
    for (int64_t t = 0; t < tiles; ++t)
        for (int64_t row = 0; row < m; row += 32) {
            const int64_t at = t * WIDE;
            (m - row > 16 ? tile<2> : tile<1>)(pairs + row * k / 2, weight + at * k, bias ? bias + at : nullptr,
                                               out + row * n + at, std::min<int64_t>(m - row, 32), n, k,
                                               std::min<int64_t>(n - at, WIDE));
        }
}
#endif

template <typename T>
void rms_norm(const T* x, const T* weight, T* out, int64_t rows, int64_t n, float eps) {
#pragma omp parallel for if (rows * n > 65536)
    for (int64_t row = 0; row < rows; ++row) {
        const T* from = x + row * n;
        T* to = out + row * n;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < n; ++i) sum += load(from[i]) * load(from[i]);
        const float scale = 1.0f / std::sqrt(sum / n + eps);
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) store(to + i, load(weight[i]) * rounded(load(from[i]) * scale, weight));
    }
}

// x (tokens, heads, dim) in place, a token's heads `stride` apart from the next token's; cos and sin (tokens, dim).
template <typename T>
void rotary(T* x, const T* cos, const T* sin, int64_t tokens, int64_t heads, int64_t dim, int64_t stride) {
    const int64_t half = dim / 2;
    for (int64_t t = 0; t < tokens; ++t) {
        const T *c = cos + t * dim, *s = sin + t * dim;
        for (int64_t h = 0; h < heads; ++h) {
            T *low = x + t * stride + h * dim, *high = low + half;
#pragma omp simd
            for (int64_t i = 0; i < half; ++i) {
                const float a = load(low[i]), b = load(high[i]);
                // Each product is rounded as torch rounds it, so that 16-bit results agree with the reference.
                const float ac = rounded(a * load(c[i]), x), bs = rounded(b * load(s[i]), x);
                const float bc = rounded(b * load(c[half + i]), x), as = rounded(a * load(s[half + i]), x);
                store(low + i, ac - bs);
                store(high + i, bc + as);
            }
        }
    }
}

template <typename T>
void silu_mul(const T* gate_up, T* out, int64_t rows, int64_t n) {
#pragma omp parallel for if (rows * n > 65536)
    for (int64_t row = 0; row < rows; ++row) {
        const T *gate = gate_up + row * 2 * n, *up = gate + n;
        T* to = out + row * n;
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) {
            const float g = load(gate[i]);
            store(to + i, rounded(g / (1.0f + exp_fast(std::min(-g, 88.0f))), up) * load(up[i]));
        }
    }
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

constexpr int64_t CHUNK = 128;  // columns whose codes fill one vector of sixteen 32-bit words

// The scales of packed weights, as the file stored them: 0 float32, 1 bfloat16, 2 float16.
struct Scales {
    const void* at;
    int64_t kind;
    float operator[](int64_t i) const {
        if (kind == 0) return static_cast<const float*>(at)[i];
        const uint32_t bits = static_cast<const uint16_t*>(at)[i];
#ifdef __F16C__
        if (kind == 2) return _cvtsh_ss(bits);
#endif
        uint32_t wide = bits << 16;
        float value;
        if (kind == 2) wide = (bits & 0x7fff) << 13;  // exponent and fraction in float32's places, 112 powers too low
        std::memcpy(&value, &wide, 4);
        if (kind == 1) return value;
        if ((bits & 0x7c00) == 0x7c00) return bits & 0x3ff ? NAN : bits & 0x8000 ? -INFINITY : INFINITY;
        return bits & 0x8000 ? value * -0x1p112f : value * 0x1p112f;
    }
};

// The zeros of packed weights: one for each group, or (`by` 0) one for all.
struct Zeros {
    const uint8_t* at;
    int64_t by;
    float operator[](int64_t i) const { return at[i * by]; }
};

// One output of a packed row: per group, scale * (sum of code * x - zero * sum of x). Nibble p of word w is column
// 8w + p; `split` holds each chunk of x in that order, all first nibbles' columns, then all second ones'.
float int4_dot(const uint8_t* codes, Scales scales, Zeros zeros, int64_t first, const float* split, const float* sums,
               int64_t groups, int64_t chunks) {
    f32x16 sum{};
    float rest = 0;
    for (int64_t g = 0; g < groups; ++g) {
        f32x16 one{}, two{};
        for (int64_t c = 0; c < chunks; ++c, codes += CHUNK / 2, split += CHUNK) {
            i32x16 words;
            std::memcpy(&words, codes, sizeof words);
            for (int p = 0; p < 8; p += 2) {
                one += floats(words >> (4 * p) & 15) * load16(split + 16 * p);
                two += floats(words >> (4 * p + 4) & 15) * load16(split + 16 * p + 16);
            }
        }
        const float scale = scales[first + g];
        sum += scale * (one + two);
        rest += scale * zeros[first + g] * sums[g];
    }
    return total(sum) - rest;
}

// Few rows of x (m, k) times packed weights (n, k), which are read as they lie; groups are whole chunks.
template <typename T>
void int4_linear(const T* x, const uint8_t* codes, Scales scales, Zeros zeros, T* out, int64_t m, int64_t n, int64_t k,
                 int64_t groups) {
    const int64_t size = k / groups;
    std::vector<float> split(m * k), sums(m * groups);
    for (int64_t row = 0; row < m; ++row)
        for (int64_t column = 0; column < k; ++column) {
            const float value = load(x[row * k + column]);
            const int64_t chunk = column / CHUNK, word = column % CHUNK / 8, nibble = column % 8;
            split[row * k + chunk * CHUNK + nibble * 16 + word] = value;
            sums[row * groups + column / size] += value;
        }
    const float *inputs = split.data(), *totals = sums.data();
#pragma omp parallel for schedule(static) if (n * k > 32768)
    for (int64_t row = 0; row < n; ++row)
        for (int64_t i = 0; i < m; ++i)
            store(out + i * n + row, int4_dot(codes + row * k / 2, scales, zeros, row * groups, inputs + i * k,
                                              totals + i * groups, groups, size / CHUNK));
}

// Weights (code - zero) * scale, columns in the order of int4_dot's `split`, for a product with x in the same order.
template <typename T>
void int4_unpack(const uint8_t* codes, Scales scales, Zeros zeros, T* out, int64_t n, int64_t k, int64_t groups) {
    const int64_t chunks = k / CHUNK, per_group = chunks / groups;
#pragma omp parallel for schedule(static) if (n * k > 32768)
    for (int64_t row = 0; row < n; ++row)
        for (int64_t c = 0; c < chunks; ++c) {
            const int64_t at = row * groups + c / per_group;
            const float scale = scales[at];
            const float zero = zeros[at];
            i32x16 words;
            std::memcpy(&words, codes + (row * chunks + c) * (CHUNK / 2), sizeof words);
            for (int p = 0; p < 8; ++p) store16(out + (row * chunks + c) * CHUNK + 16 * p, scale * (floats(words >> (4 * p) & 15) - zero));
        }
}

// Codes of 2 or 3 bits to codes of 4: n rows of k columns, eight of which are a word of nibbles. A packed row is the low
// two bits of all columns, then their third bits: 16 and 8 bits of a word, lowest column first.
void nibbles(const uint8_t* packed, uint8_t* out, int64_t n, int64_t k, int64_t bits) {
    const int64_t words = k / 8;
#pragma omp parallel for schedule(static) if (n * k > 32768)
    for (int64_t row = 0; row < n; ++row) {
        const uint8_t *low = packed + row * words * bits, *high = low + words * 2;
        uint8_t* to = out + row * words * 4;
        for (int64_t w = 0; w < words; ++w) {
            uint32_t x = low[2 * w] | static_cast<uint32_t>(low[2 * w + 1]) << 8;
            x = (x | x << 8) & 0x00ff00ff;
            x = (x | x << 4) & 0x0f0f0f0f;
            x = (x | x << 2) & 0x33333333;
            if (bits == 3) {
                uint32_t y = high[w];
                y = (y | y << 12) & 0x000f000f;
                y = (y | y << 6) & 0x03030303;
                y = (y | y << 3) & 0x11111111;
                x |= y << 2;
            }
            std::memcpy(to + 4 * w, &x, 4);
        }
    }
}

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
    for (int64_t t = 0; t < n; ++t)
        for (int c = 0; c < V; ++c) {
            const lanes x = load_lanes(v + places[t] * dim + LANES * c);
            for (int g = 0; g < G; ++g) sums[g][c] += p[g * apart + t] * x;
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
template <typename T, typename C>
void paged_attention(const T* query, const C* k, const C* v, const float* k_scales, const float* v_scales,
                     const float* codes, const float* sinks, T* out, const int64_t* rows, const int64_t* tables,
                     const int64_t* lengths, int64_t requests, const int64_t* shape, float scale, float softcap) {
    const Shape s{shape[0], shape[1], shape[2], shape[3], shape[4], shape[5], shape[6], shape[7], shape[8], shape[9]};
    const int64_t each = s.queries * s.kv_heads, tasks = requests * each;
#pragma omp parallel if (tasks > 1)
    {
        Scratch scratch;
        float8_table = codes;
#pragma omp for schedule(dynamic, 4)
        for (int64_t task = 0; task < tasks; ++task) {
            const int64_t b = task / each, row = task % each / s.kv_heads, end = lengths[b] - s.queries + row + 1;
            attend(query + (rows[b] + row) * s.query_stride, k, v, k_scales, v_scales, sinks,
                   out + (rows[b] + row) * s.heads * s.value_dim, tables + b * s.table_width, end, task % s.kv_heads, s,
                   scale, softcap, scratch);
        }
    }
}

}  // namespace

#define EXPORT(T, suffix)                                                                                              \
    void llmopt_rms_norm_##suffix(const T* x, const T* w, T* out, int64_t rows, int64_t n, float eps) {                \
        rms_norm(x, w, out, rows, n, eps);                                                                             \
    }                                                                                                                  \
    void llmopt_rotary_##suffix(T* x, const T* c, const T* s, int64_t tokens, int64_t heads, int64_t dim, int64_t by) { \
        rotary(x, c, s, tokens, heads, dim, by);                                                                       \
    }                                                                                                                  \
    void llmopt_linear_rows_##suffix(const T* x, const T* w, const T* bias, T* out, int64_t m, int64_t n, int64_t k) { \
        linear_rows(x, w, bias, out, m, n, k);                                                                         \
    }                                                                                                                  \
    void llmopt_silu_mul_##suffix(const T* x, T* out, int64_t rows, int64_t n) { silu_mul(x, out, rows, n); }          \
    void llmopt_store_rows_##suffix(const T* x, T* cache, const int64_t* slots, int64_t tokens, int64_t width,         \
                                    int64_t by) {                                                                      \
        store_rows(x, cache, slots, tokens, width, by);                                                                \
    }                                                                                                                  \
    void llmopt_int4_linear_##suffix(const T* x, const uint8_t* codes, const void* scales, const uint8_t* zeros,       \
                                     T* out, int64_t m, int64_t n, int64_t k, int64_t groups, int64_t kind,            \
                                     int64_t by) {                                                                     \
        int4_linear(x, codes, Scales{scales, kind}, Zeros{zeros, by}, out, m, n, k, groups);                           \
    }                                                                                                                  \
    void llmopt_int4_unpack_##suffix(const uint8_t* codes, const void* scales, const uint8_t* zeros, T* out,           \
                                     int64_t n, int64_t k, int64_t groups, int64_t kind, int64_t by) {                 \
        int4_unpack(codes, Scales{scales, kind}, Zeros{zeros, by}, out, n, k, groups);                                 \
    }                                                                                                                  \
    void llmopt_store_int8_##suffix(const T* x, int8_t* cache, float* scales, const int64_t* slots, int64_t tokens,    \
                                    int64_t heads, int64_t dim, int64_t by) {                                          \
        store_int8(x, cache, scales, slots, tokens, heads, dim, by);                                                   \
    }                                                                                                                  \
    ATTENTION(T, T, own, suffix)                                                                                       \
    ATTENTION(T, q8, int8, suffix)                                                                                     \
    ATTENTION(T, f8, fp8, suffix)

#define ATTENTION(T, C, cached, suffix)                                                                                \
    void llmopt_paged_attention_##cached##_##suffix(                                                                   \
        const T* q, const C* k, const C* v, const float* k_scales, const float* v_scales, const float* codes,          \
        const float* sinks, T* out, const int64_t* rows, const int64_t* tables, const int64_t* lengths,                \
        int64_t requests, const int64_t* shape, float scale, float softcap) {                                          \
        paged_attention(q, k, v, k_scales, v_scales, codes, sinks, out, rows, tables, lengths, requests, shape, scale, \
                        softcap);                                                                                      \
    }

extern "C" {
#ifdef __AVX512F__
int64_t llmopt_multiplies_bf16() { return __builtin_cpu_supports("avx512bf16"); }
void llmopt_linear_bf16(const bf16* x, const bf16* w, const bf16* bias, bf16* out, int64_t m, int64_t n, int64_t k) {
    linear_bf16(x, w, bias, out, m, n, k);
}
#endif
void llmopt_nibbles(const uint8_t* packed, uint8_t* out, int64_t n, int64_t k, int64_t bits) {
    nibbles(packed, out, n, k, bits);
}
EXPORT(float, f32)
EXPORT(bf16, bf16)
}
