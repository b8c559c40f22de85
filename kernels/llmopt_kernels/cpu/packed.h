// Products with integer weights that stay packed, and how they are unpacked.
#pragma once
#include <vector>
#include "numbers.h"

namespace {

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

}  // namespace
