// Sums of products of a row of floats and signed 4-bit codes, by integers: what one row needs to keep up with the memory.
//
// A group of the row becomes 24-bit fixed point, x = scale (q0 + 2^8 q1 + 2^16 q2) with signed bytes q, exact to 2^-24 of
// the group's largest number: as exact as float32 sums, in 9 instructions for 128 codes where floats take 24. The weight
// lies as for `Codes`: the low halves of a word's bytes are its even columns, the high halves the odd ones.
#include <cstdint>

namespace gemm {

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
constexpr bool LIMBS = true;
#else
constexpr bool LIMBS = false;
#endif

// Of a group: its scale (no number where one of x is none or infinite), and the sums of each q.
struct LimbHead {
    float scale;
    int32_t sums[3];
};

// A row as limbs, three runs of `stored` bytes; columns from `columns` on are 0. `stored` and `unit`: multiples of 16.
static void limb_row(const float *from, int64_t columns, int64_t stored, int64_t unit, int64_t groups, int8_t *limbs,
                     LimbHead *heads) {
#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
    const __m512i order = _mm512_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
    for (int64_t group = 0; group < groups; ++group) {
        int64_t first = group * unit, last = group + 1 < groups ? first + unit : stored;
        __m512 most = _mm512_setzero_ps(), none = most;
        for (int64_t k = first; k < last; k += 16) {
            int64_t left = columns - k;
            __mmask16 mask = left >= 16 ? 0xffff : left > 0 ? (__mmask16)((1u << left) - 1) : 0;
            __m512 x = _mm512_maskz_loadu_ps(mask, from + k);
            most = _mm512_max_ps(most, _mm512_abs_ps(x));
            none = _mm512_fmadd_ps(x, _mm512_setzero_ps(), none);
        }
        float largest = _mm512_reduce_max_ps(most);
        float inverse = largest > 1e-30f ? 8323072.0f / largest : 0.0f;
        __m512 factor = _mm512_set1_ps(inverse);
        __m512i sums[3] = {};
        for (int64_t k = first; k < last; k += 16) {
            int64_t left = columns - k;
            __mmask16 mask = left >= 16 ? 0xffff : left > 0 ? (__mmask16)((1u << left) - 1) : 0;
            __m512 x = _mm512_maskz_loadu_ps(mask, from + k);
            __m512i q = _mm512_permutexvar_epi32(order, _mm512_cvtps_epi32(_mm512_mul_ps(x, factor)));
#pragma GCC unroll 3
            for (int limb = 0; limb < 3; ++limb) {
                __m512i low = _mm512_srai_epi32(_mm512_slli_epi32(q, 24), 24);
                sums[limb] = _mm512_add_epi32(sums[limb], low);
                _mm_storeu_si128((__m128i *)(limbs + limb * stored + k), _mm512_cvtepi32_epi8(low));
                q = _mm512_srai_epi32(_mm512_sub_epi32(q, low), 8);
            }
        }
        heads[group].scale = largest / 8323072.0f + _mm512_reduce_add_ps(none);
        for (int limb = 0; limb < 3; ++limb) heads[group].sums[limb] = _mm512_reduce_add_epi32(sums[limb]);
    }
#endif
}

// sum[0][j] += weight of panel j times the row over `steps` steps of 8 columns.
template <int C>
static inline __attribute__((always_inline)) void add_limbs(Floats (&sum)[1][C], const int8_t *limbs, int64_t stored,
                                                            const LimbHead &head, const uint8_t *weight, int64_t steps) {
    constexpr uint32_t MASK = 0x0f0f0f0f;
    Ints made[3][C];
    clear(made);
    for (int64_t step = 0; step < steps; ++step) {
        soon<1, 64 * C>(weight + step * 256);
        Words low[C], high[C];
#pragma GCC unroll 4
        for (int j = 0; j < C; ++j) {
            Words held = load<Words>(weight + step * 256 + j * 64);
            low[j] = held & MASK, high[j] = (held >> 4) & MASK;
        }
#pragma GCC unroll 3
        for (int limb = 0; limb < 3; ++limb) {
            int32_t even = load<int32_t>(limbs + limb * stored + step * 8);
            int32_t odd = load<int32_t>(limbs + limb * stored + step * 8 + 4);
#pragma GCC unroll 4
            for (int j = 0; j < C; ++j) made[limb][j] = dot4(dot4(made[limb][j], low[j], even), high[j], odd);
        }
    }
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) {
        Floats total = floats(made[2][j] - 8 * head.sums[2]);
        total = fused(total, each(256.0f), floats(made[1][j] - 8 * head.sums[1]));
        total = fused(total, each(256.0f), floats(made[0][j] - 8 * head.sums[0]));
        sum[0][j] = fused(total, each(head.scale), sum[0][j]);
    }
}

}  // namespace gemm
