// Codes of rows, with the scales that go with them; formulas as in quantize_rows.py, quantize_groups.py,
// quantize_static.py and pack_int4.py of planish/kernels.
//
// x is multiplied by 1 / scale; the ratio is rounded to the nearest integer, ties to even. A scale is 1 where the range
// is nothing, at least the least normal float32, and no number where one of the row is none.
#include "base.h"
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace row {

static inline __attribute__((always_inline)) float scale_of(float extreme, float levels) {
    return extreme == 0.0f ? 1.0f : maximum(1.1754943508222875e-38f, extreme / levels);
}

static inline __attribute__((always_inline)) float clamp(float x, float low, float high) {
    return minimum(maximum(x, low), high);
}

static inline __attribute__((always_inline)) int32_t clamped(int32_t code, int32_t low, int32_t high) {
    int32_t above = code < low ? low : code;
    return above > high ? high : above;
}

// Integers are clamped, by one instruction each; the ratio before that to what an integer holds: below, a conversion
// saturates by itself.
static inline __attribute__((always_inline)) int8_t code_of(float ratio, int32_t low, int32_t high) {
    return (int8_t)clamped(__builtin_irintf(minimum(ratio, 1048576.0f)), low, high);
}

static inline __attribute__((always_inline)) int8_t shifted_code(float ratio, int32_t zero, int32_t low, int32_t high) {
    return (int8_t)(clamped(__builtin_irintf(minimum(ratio, 1048576.0f)), low - zero, high - zero) + zero);
}

// `shifted_code` of a row under one scale; zero = 0: `code_of`.
template <int LOW, int HIGH>
static inline void codes_of(const float *__restrict x, int64_t columns, float inverse, int32_t zero,
                            int8_t *__restrict codes) {
#if defined(__AVX512F__)
    __m512i least = _mm512_set1_epi32(LOW - zero), most = _mm512_set1_epi32(HIGH - zero), shift = _mm512_set1_epi32(zero);
    for (int64_t j = 0; j < columns; j += 16) {
        __mmask16 some = (__mmask16)(columns - j < 16 ? (1u << (columns - j)) - 1 : 0xffff);
        __m512 ratio = _mm512_mul_ps(_mm512_maskz_loadu_ps(some, x + j), _mm512_set1_ps(inverse));
        __m512i code = _mm512_cvtps_epi32(_mm512_min_ps(ratio, _mm512_set1_ps(1048576.0f)));
        code = _mm512_max_epi32(code, least);
        if (HIGH < 127) code = _mm512_min_epi32(code, most);  // what makes bytes of integers clamps them to 127
        _mm512_mask_cvtsepi32_storeu_epi8(codes + j, some, _mm512_add_epi32(code, shift));
    }
#else
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j) codes[j] = shifted_code(x[j] * inverse, zero, LOW, HIGH);
#endif
}

// The zero point of a row whose least element is `bottom` <= 0, from `low` on.
static inline float token_zero(float bottom, float scale, float levels, float low) {
    return clamp(__builtin_rintf(-bottom / scale), 0.0f, levels) + low;
}

// The zero point of a row from -floor to `top` >= 0, from `low` on; `product` = levels floor. As torch divides by a tensor.
static inline float floor_zero(float top, float floor, float product, float low) {
    return maximum(1.0f, __builtin_floorf(1.0f / (top + floor) * product)) + low;
}

// Codes of x[first .. last), `group` columns with a scale each; `first` is a multiple of the group.
// Under the rule "half" (levels 7.5) the extremes are ties: there the ratio is the correctly rounded quotient.
template <int group, bool half>
static inline void group_codes(const float *__restrict x, int64_t first, int64_t last, float levels, int32_t low,
                               int32_t high, int8_t *__restrict codes, float *__restrict scales) {
    for (int64_t start = first; start < last; start += group) {
        int64_t end = start + group < last ? start + group : last;
        int32_t extreme = 0;
        if (end - start == group) {
#pragma omp simd reduction(max : extreme)
            for (int j = 0; j < group; ++j) extreme = larger(order(x[start + j]), extreme);
        } else {
            for (int64_t j = start; j < end; ++j) extreme = larger(order(x[j]), extreme);
        }
        float scale = scale_of(size_of(extreme), levels), inverse = 1.0f / scale;
        scales[start / group] = scale;
        if (end - start == group) {
#pragma omp simd
            for (int j = 0; j < group; ++j)
                codes[start + j] = code_of(half ? x[start + j] / scale : x[start + j] * inverse, low, high);
        } else {
            for (int64_t j = start; j < end; ++j)
                codes[j] = code_of(half ? x[j] / scale : x[j] * inverse, low, high);
        }
    }
}

// Two codes a byte: byte j of a span of 64 holds code j below code j + 32. Codes beyond `columns` are 0; `first` is a
// multiple of 64.
static inline void pack_halves(int8_t *__restrict codes, int64_t first, int64_t columns, int8_t *__restrict packed) {
    int64_t whole = (columns + 63) / 64 * 64;
    for (int64_t j = columns; j < whole; ++j) codes[j] = 0;
    for (int64_t start = first; start < whole; start += 64) {
#pragma omp simd
        for (int j = 0; j < 32; ++j)
            packed[start / 2 + j] =
                (int8_t)((uint8_t)(codes[start + j] & 15) | (uint8_t)((uint8_t)codes[start + 32 + j] << 4));
    }
}

}  // namespace row
