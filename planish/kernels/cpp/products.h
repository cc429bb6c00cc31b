// What sums over columns of a row: channels in short segments, the down-projection of a low-rank branch.
#include "base.h"

namespace row {

// made[c] = sum_t share[t, c] x[places[t, c]], in order of t.
static inline void reassemble(const float *__restrict x, const int32_t *__restrict places,
                              const float *__restrict share, int64_t terms, int64_t columns, float *__restrict made) {
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j) made[j] = x[places[j]] * share[j];
    for (int64_t t = 1; t < terms; ++t) {
        const int32_t *__restrict place = places + t * columns;
        const float *__restrict factor = share + t * columns;
#pragma omp simd
        for (int64_t j = 0; j < columns; ++j) made[j] = made[j] + x[place[j]] * factor[j];
    }
}

typedef float sixteen_t __attribute__((vector_size(64)));
typedef uint32_t sixteen_bits_t __attribute__((vector_size(64)));
typedef uint16_t sixteen_halves_t __attribute__((vector_size(32)));

static inline __attribute__((always_inline)) sixteen_t sixteen(const float *x) {
    sixteen_t held;
    __builtin_memcpy(&held, x, 64);
    return held;
}

static inline __attribute__((always_inline)) sixteen_t sixteen(const bf16_t *x) {
    sixteen_halves_t held;
    __builtin_memcpy(&held, x, 32);
    return (sixteen_t)(__builtin_convertvector(held, sixteen_bits_t) << 16);
}

static inline __attribute__((always_inline)) sixteen_t sixteen(const f16_t *x) {
    sixteen_t held;
    for (int j = 0; j < 16; ++j) held[j] = wide(x[j]);
    return held;
}

// left[r] = sum_k x[k] weight[r, k] for `count` r; x is rounded to the weight's dtype already. Vectors are spelled out:
// g++ 12 does not find them in sums of this form.
template <int count, typename T>
static inline __attribute__((always_inline)) void down_some(const float *__restrict x, const T *__restrict weight,
                                                            int64_t columns, T *__restrict left) {
    sixteen_t sums[count] = {};
    int64_t k = 0;
    for (; k + 16 <= columns; k += 16) {
        sixteen_t held = sixteen(x + k);
        for (int r = 0; r < count; ++r) sums[r] += held * sixteen(weight + r * columns + k);
    }
    for (int r = 0; r < count; ++r) {
        float sum = 0.0f;
        for (int j = 0; j < 16; ++j) sum += sums[r][j];
        for (int64_t j = k; j < columns; ++j) sum += x[j] * wide(weight[r * columns + j]);
        left[r] = narrow<T>(sum);
    }
}

template <typename T>
static inline void down(const float *__restrict x, const T *__restrict weight, int64_t rank, int64_t columns,
                        T *__restrict left) {
    int64_t r = 0;
    for (; r + 4 <= rank; r += 4) down_some<4>(x, weight + r * columns, columns, left + r);
    for (; r < rank; ++r) down_some<1>(x, weight + r * columns, columns, left + r);
}

}  // namespace row
