// The CPU ops. A plain C interface (pointers and sizes), compiled once per instruction set; reference.py is the
// specification. Rows are split over the OpenMP threads of whichever runtime torch has already loaded: a second runtime
// in the process would spin against it.
#include "attention.h"
#include "elements.h"
#include "layers.h"
#include "packed.h"
#include "products.h"

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
    void llmopt_argmax_##suffix(const T* x, int64_t* out, int64_t rows, int64_t n) { argmax(x, out, rows, n); }        \
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
void llmopt_decoder_layers_bf16(const Step* step, const Layer* layers, int64_t count) {
    decoder_layers(*step, layers, count);
}
#endif
void llmopt_nibbles(const uint8_t* packed, uint8_t* out, int64_t n, int64_t k, int64_t bits) {
    nibbles(packed, out, n, k, bits);
}
EXPORT(float, f32)
EXPORT(bf16, bf16)
}
