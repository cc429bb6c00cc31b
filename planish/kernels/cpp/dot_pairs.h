// Sums of products of bfloat16 pairs: rows of bfloat16 times panels of 4- or 2-bit codes, float32 sums.
//
// The weight lies as for `Codes`. A step of STEP columns has the codes of its first half in the low and those of its second
// half in the high 16 bits of each lane: pair p multiplies columns p and STEP / 2 + p, and `pair_rows` lays the
// activation out so. Codes are small integers, exact in bfloat16.
#include <cstdint>

namespace gemm {

// sum[i][j] += weight of panel j times row i over `steps` steps; SIGNED: codes less 2^(BITS - 1).
template <int BITS, bool SIGNED, int R, int C>
static inline __attribute__((always_inline)) void add_pairs(Floats (&sum)[R][C], const uint32_t *left, int64_t width,
                                                            const uint8_t *weight, int64_t steps) {
    constexpr int PAIRS = 16 / BITS, CHAINS = R <= 2 ? 2 : 1;  // few sums would wait for each other
    Floats more[CHAINS == 2 ? R : 1][CHAINS == 2 ? C : 1];
    clear(more);
#if defined(__AVX512BF16__)
    typedef uint16_t Halves __attribute__((vector_size(64), may_alias));
    Halves table;  // of the low five bits of a half lane; _mm512_permutexvar_epi16 ignores the others
    for (int i = 0; i < 32; ++i) {
        float code = (float)((i & ((1 << BITS) - 1)) - (SIGNED ? 1 << (BITS - 1) : 0));
        table[i] = (uint16_t)(row::bits_of(code) >> 16);
    }
#endif
    for (int64_t step = 0; step < steps; ++step) {
        soon<R, 64 * C>(weight + step * 256);
        Words held[C];
#pragma GCC unroll 4
        for (int j = 0; j < C; ++j) held[j] = load<Words>(weight + step * 256 + j * 64);
#pragma GCC unroll 8
        for (int pair = 0; pair < PAIRS; ++pair) {
#if defined(__AVX512BF16__)
            __m512bh w[C];
#pragma GCC unroll 4
            for (int j = 0; j < C; ++j) {
                __m512i at = _mm512_srli_epi16((__m512i)held[j], BITS * pair);
                w[j] = (__m512bh)_mm512_permutexvar_epi16(at, (__m512i)table);
            }
#pragma GCC unroll 8
            for (int i = 0; i < R; ++i) {
                __m512bh x = (__m512bh)_mm512_set1_epi32((int32_t)left[i * width + step * PAIRS + pair]);
#pragma GCC unroll 4
                for (int j = 0; j < C; ++j) {
                    Floats &to = CHAINS == 2 && pair % 2 ? more[i][j] : sum[i][j];
                    to = (Floats)_mm512_dpbf16_ps((__m512)to, w[j], x);
                }
            }
#else
            Floats low[C], high[C];
#pragma GCC unroll 4
            for (int j = 0; j < C; ++j) {
                low[j] = codes<BITS, SIGNED>(held[j], BITS * pair);
                high[j] = codes<BITS, SIGNED>(held[j], BITS * pair + 16);
            }
#pragma GCC unroll 8
            for (int i = 0; i < R; ++i) {
                uint32_t x = left[i * width + step * PAIRS + pair];
                Floats first = each(row::float_of(x << 16)), second = each(row::float_of(x & 0xffff0000));
#pragma GCC unroll 4
                for (int j = 0; j < C; ++j) sum[i][j] = fused(high[j], second, fused(low[j], first, sum[i][j]));
            }
#endif
        }
    }
    add_chains<CHAINS>(sum, more);
}

// Rows of bfloat16 as pairs of columns, `width` words apart; columns from `columns` on are 0, up to `stored`.
template <int STEP>
static void pair_rows(const bf16_t *from, int64_t rows, int64_t columns, int64_t stored, int64_t width, uint32_t *to) {
    for (int64_t i = 0; i < rows; ++i) {
        const bf16_t *x = from + i * columns;
        uint32_t *out = to + i * width;
        int64_t whole = columns / STEP * STEP;
        for (int64_t k = 0; k < whole; k += STEP) {
            for (int p = 0; p < STEP / 2; ++p) *out++ = x[k + p].bits | (uint32_t)x[k + STEP / 2 + p].bits << 16;
        }
        for (int64_t k = whole; k < stored; k += STEP) {
            for (int64_t p = k; p < k + STEP / 2; ++p) {
                uint32_t low = p < columns ? x[p].bits : 0, high = p + STEP / 2 < columns ? x[p + STEP / 2].bits : 0;
                *out++ = low | high << 16;
            }
        }
    }
}

// Sums of each `unit` columns of rows: [rows][groups].
template <typename T>
static void row_totals(const T *from, int64_t rows, int64_t columns, int64_t unit, int64_t groups, float *totals) {
    for (int64_t i = 0; i < rows; ++i) {
        for (int64_t group = 0; group < groups; ++group) {
            int64_t first = group * unit, last = first + unit < columns ? first + unit : columns;
            Floats total = {};
            int64_t k = first;
            for (; k + 16 <= last; k += 16) total += wide16(from + i * columns + k);
            float sum = 0.0f;
            for (; k < last; ++k) sum += row::wide(from[i * columns + k]);
            for (int lane = 0; lane < 16; ++lane) sum += total[lane];
            totals[i * groups + group] = sum;
        }
    }
}

}  // namespace gemm
