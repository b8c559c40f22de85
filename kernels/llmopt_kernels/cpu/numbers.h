// Numbers: what the ops read, compute in and write. One by one, and sixteen at a time.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
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

}  // namespace
