// The Walsh-Hadamard transform on blocks of a row, in place, not normalised; see hadamard.py of planish/kernels.
//
// Sums and differences in the order of the reference (near pairs first; far pairs first where `far`), so that results
// are equal bit for bit. Pairs within eight columns are turned by shuffles.
#include "base.h"

namespace row {

typedef float eight_t __attribute__((vector_size(32)));
typedef int32_t places_t __attribute__((vector_size(32)));

// Pairs of neighbours `half` apart, half < 8: b + a where b is the other one, with a's sign turned in the second.
template <int half>
static inline __attribute__((always_inline)) eight_t walsh_pairs(eight_t x) {
    const places_t own = {0, 1, 2, 3, 4, 5, 6, 7};
    eight_t other = __builtin_shuffle(x, own ^ half);
    places_t second = (own & half) != 0;
    return other + (eight_t)((places_t)x ^ (second & INT32_MIN));
}

template <int half>
static inline void walsh_near(float *x, int64_t columns) {
    for (int64_t j = 0; j < columns; j += 8) {
        eight_t held;
        __builtin_memcpy(&held, x + j, 32);
        held = walsh_pairs<half>(held);
        __builtin_memcpy(x + j, &held, 32);
    }
}

static inline void walsh_round(float *x, int64_t columns, int64_t half) {
    if (columns % 8 == 0 && half < 8) {
        if (half == 1) walsh_near<1>(x, columns);
        if (half == 2) walsh_near<2>(x, columns);
        if (half == 4) walsh_near<4>(x, columns);
        return;
    }
    for (int64_t start = 0; start < columns; start += 2 * half) {
        float *__restrict a = x + start, *__restrict b = x + start + half;
#pragma omp simd
        for (int64_t j = 0; j < half; ++j) {
            float sum = a[j] + b[j], difference = a[j] - b[j];
            a[j] = sum;
            b[j] = difference;
        }
    }
}

static inline void walsh(float *x, int64_t columns, int64_t order, bool far) {
    if (far) {
        for (int64_t half = order / 2; half > 0; half /= 2) walsh_round(x, columns, half);
    } else {
        for (int64_t half = 1; half < order; half *= 2) walsh_round(x, columns, half);
    }
}

// x as [.., base, inner] times the matrix [base, base] over its base; `held`: base * inner floats.
static inline void walsh_dense(float *__restrict x, const int8_t *__restrict matrix, int64_t columns, int64_t base,
                               int64_t inner, float *__restrict held) {
    for (int64_t start = 0; start < columns; start += base * inner) {
        for (int64_t to = 0; to < base; ++to) {
            float *__restrict made = held + to * inner;
            for (int64_t j = 0; j < inner; ++j) made[j] = 0.0f;
            for (int64_t from = 0; from < base; ++from) {
                float factor = (float)matrix[to * base + from];
                const float *__restrict line = x + start + from * inner;
#pragma omp simd
                for (int64_t j = 0; j < inner; ++j) made[j] += factor * line[j];
            }
        }
        __builtin_memcpy(x + start, held, base * inner * sizeof(float));
    }
}

}  // namespace row
