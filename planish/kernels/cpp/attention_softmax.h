// Attention, its softmax: scores of base 2 in blocks of 32 keys, their exponentials, the row's last factor.
#include "attention_tiles.h"

namespace attention {

static inline __attribute__((always_inline)) Floats larger(Floats a, Floats b) {
#if defined(__AVX512F__)
    return (Floats)_mm512_max_ps((__m512)a, (__m512)b);  // b where either is no number
#else
    return a > b ? a : b;
#endif
}

// 2^x; 0 below -126.
static inline __attribute__((always_inline)) Floats powers(Floats x) {
#if defined(__AVX512DQ__)
    Floats r = (Floats)_mm512_reduce_ps((__m512)x, 9), p;  // x less the whole number below it; 0 of -infinity
#else
    Floats kept = larger(x, gemm::each(-160.0f)), n, p;
    for (int i = 0; i < 16; ++i) n[i] = __builtin_floorf(kept[i]);
    Floats r = kept - n;
#endif
    p = gemm::fused(gemm::each(1.8671301659196615e-3f), r, gemm::each(9.017029777169228e-3f));
    p = gemm::fused(p, r, gemm::each(5.579991266131401e-2f));
    p = gemm::fused(p, r, gemm::each(2.4016444385051727e-1f));
    p = gemm::fused(p, r, gemm::each(6.931512951850891e-1f));
    p = gemm::fused(p, r, gemm::each(1.0f));
#if defined(__AVX512DQ__)
    return (Floats)_mm512_scalef_ps((__m512)p, (__m512)x);
#else
    Floats made;
    for (int i = 0; i < 16; ++i) {
        float power = row::float_of(row::bits_of(p[i]) + ((uint32_t)(int32_t)row::maximum(n[i], -126.0f) << 23));
        made[i] = x[i] >= -126.0f ? power : x[i] == x[i] ? 0.0f : x[i];
    }
    return made;
#endif
}

// The nearest whole numbers.
static inline __attribute__((always_inline)) Floats whole(Floats x) {
#if defined(__AVX512F__)
    return (Floats)_mm512_roundscale_ps((__m512)x, 8);
#else
    for (int i = 0; i < 16; ++i) x[i] = __builtin_rintf(x[i]);
    return x;
#endif
}

// `x` in the lanes whose bit is set, else minus infinity.
static inline __attribute__((always_inline)) Floats keep(Floats x, uint32_t bits) {
#if defined(__AVX512F__)
    return (Floats)_mm512_mask_blend_ps((__mmask16)bits, _mm512_set1_ps(-__builtin_inff()), (__m512)x);
#else
    for (int i = 0; i < 16; ++i) x[i] = bits >> i & 1 ? x[i] : -__builtin_inff();
    return x;
#endif
}

// -- masks ---------------------------------------------------------------------------------------

template <typename M>
static inline const M *mask_line(const Sizes &s, const void *mask, int64_t batch, Row own) {
    return (const M *)mask + batch * s.mask[0] + own.head * s.mask[1] + own.place * s.mask[2];
}

// A bit for each of up to 32 keys that a line of a bool mask keeps.
static inline uint32_t kept(const uint8_t *line, int64_t step, int64_t count) {
    if (step == 0) return *line ? ~0u : 0;
    uint32_t bits = 0;
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    if (step == 1) {
        __m256i held = _mm256_maskz_loadu_epi8(count < 32 ? (1u << count) - 1 : ~0u, line);
        return _mm256_test_epi8_mask(held, held);
    }
#endif
    for (int64_t j = 0; j < count; ++j) bits |= (uint32_t)(line[j * step] != 0) << j;
    return bits;
}

// Numbers of a mask in base 2. The least float, which stands for "masked", stays finite: a row of nothing else weighs
// all keys alike; only minus infinity leaves a key out.
static inline __attribute__((always_inline)) Floats based(Floats mask) {
    Floats least = mask == -__builtin_inff() ? mask : gemm::each(-3.3e38f);
    return larger(mask * LOG2E, least);
}

template <typename M>
static inline __attribute__((always_inline)) Floats bias(const M *line, int64_t step, int64_t count) {
    if (step == 1 && count >= 16) return based(gemm::wide16(line));
    Floats held = {};
    for (int j = 0; j < count && j < 16; ++j) held[j] = row::wide(line[j * step]);
    return based(held);
}

// True if a mask is the same for all rows that share a key head.
static inline bool alike(const Sizes &s) {
    return (s.mask[2] == 0 || s.rows == 1) && (s.mask[1] == 0 || s.heads == s.shared);
}

// True if a mask of floats adds nothing to the scores of a key head's rows, as of texts without padding.
template <typename F>
static bool open(const Sizes &s, const void *mask, int64_t batch, int64_t head) {
    using M = typename F::M;
    bool all = true;
    if constexpr (sizeof(M) == 2 || sizeof(M) == 4) {
        if (!alike(s) || s.mask[3] != 1) return false;
        const M *line = mask_line<M>(s, mask, batch, Row{head * (s.heads / s.shared), 0});
        for (int64_t j = 0; j < s.keys; ++j) all &= row::wide(line[j]) == 0.0f;
    }
    return all;
}

// The keys that a key head's rows see at most: those at the end that a bool mask keeps from all of them, padding say,
// cost nothing.
template <typename F>
static int64_t reach(const Sizes &s, const void *mask, int64_t batch, int64_t head) {
    int64_t end = s.keys;
    if constexpr (sizeof(typename F::M) == 1) {
        if (!alike(s)) return end;
        const uint8_t *line = mask_line<uint8_t>(s, mask, batch, Row{head * (s.heads / s.shared), 0});
        while (end > 0 && !line[(end - 1) * s.mask[3]]) --end;
    }
    return end;
}

// The end of the last block of keys before `end` that a bool mask does not keep from all of COUNT rows.
template <int COUNT>
static int64_t last_seen(const Sizes &s, const void *mask, int64_t batch, const Row *own, int64_t end) {
    while (end > 0) {
        int64_t start = (end - 1) / BLOCK * BLOCK;
        for (int r = 0; r < COUNT; ++r) {
            const uint8_t *line = mask_line<uint8_t>(s, mask, batch, own[r]) + start * s.mask[3];
            if (kept(line, s.mask[3], end - start)) return end;
        }
        end = start;
    }
    return end;
}

// A bit for each key of a block that a row sees; what COUNT rows see together.
template <int COUNT>
struct Seen {
    uint32_t bits[COUNT], all;
};

// Of the `count` <= 32 keys from `start` on.
template <typename F, int COUNT>
static inline __attribute__((always_inline)) Seen<COUNT> seen(const Sizes &s, const void *mask, bool same,
                                                              int64_t batch, const Row *own, int64_t start,
                                                              int64_t count) {
    Seen<COUNT> made;
    uint32_t there = count >= BLOCK ? ~0u : (1u << count) - 1, masked = ~0u;
    made.all = ~0u;
    for (int r = 0; r < COUNT; ++r) {
        made.bits[r] = there;
        if constexpr (F::CAUSAL) {
            int64_t end = own[r].place + 1 - start;
            made.bits[r] &= end >= BLOCK ? ~0u : end <= 0 ? 0 : (1u << end) - 1;
        }
        if constexpr (sizeof(typename F::M) == 1) {
            if (r == 0 || !same)
                masked = kept(mask_line<uint8_t>(s, mask, batch, own[r]) + start * s.mask[3], s.mask[3], count);
            made.bits[r] &= masked;
        }
        made.all &= made.bits[r];
    }
    return made;
}

// -- scores --------------------------------------------------------------------------------------

// cap tanh(u / cap) of base 2; near 0, where the quotient loses places, by two terms of its series.
static inline __attribute__((always_inline)) Floats capped(const Sizes &s, Floats score) {
    Floats u = score * (s.scale / s.softcap), size = u < 0.0f ? -u : u;
    Floats e = powers(size * (-2.0f * LOG2E));
    Floats bent = (1.0f - e) / (1.0f + e), near = u - u * u * u * 0.33333333f;
    Floats signed_bent = u < 0.0f ? -bent : bent;
    return (size < 0.02f ? near : signed_bent) * (s.softcap * LOG2E);
}

// Scores of COUNT rows against the `count` <= 32 keys from `start` on: made ones of base 2, stored in rows of 32, and
// the largest so far of each lane in `most`. `open`: a mask of floats need not be looked at.
template <typename F, int COUNT>
static inline __attribute__((always_inline)) void weigh(const Sizes &s, const void *mask, bool open, bool same,
                                                        int64_t batch, const Row *own, int64_t start, int64_t count,
                                                        Floats (&sums)[COUNT][2], float *scores, Floats *most) {
    using M = typename F::M;
    if constexpr (F::CAPPED) {
        for (int r = 0; r < COUNT; ++r)
            for (int i = 0; i < 2; ++i) sums[r][i] = capped(s, sums[r][i]);
    }
    if constexpr (sizeof(M) == 2 || sizeof(M) == 4) {
        for (int r = 0; r < COUNT && !open; ++r) {
            const M *line = mask_line<M>(s, mask, batch, own[r]) + start * s.mask[3];
            sums[r][0] += bias(line, s.mask[3], count);
            if (count > 16) sums[r][1] += bias(line + 16 * s.mask[3], s.mask[3], count - 16);
        }
    }
    Seen<COUNT> keys = seen<F, COUNT>(s, mask, same, batch, own, start, count);
    if (keys.all != ~0u) {
#pragma GCC unroll UNROLL
        for (int r = 0; r < COUNT; ++r)
            sums[r][0] = keep(sums[r][0], keys.bits[r]), sums[r][1] = keep(sums[r][1], keys.bits[r] >> 16);
    }
#pragma GCC unroll UNROLL
    for (int r = 0; r < COUNT; ++r) {
        gemm::store(scores + r * BLOCK, sums[r][0]), gemm::store(scores + r * BLOCK + 16, sums[r][1]);
        most[r] = larger(larger(sums[r][0], sums[r][1]), most[r]);
    }
}

// Weights 2^(score - base) in place, of COUNT rows and `blocks` of 32 keys, and the sum of each lane; a base is a whole
// number that no score is above by more than 1/2.
template <int COUNT>
static inline void exponentials(float *scores, int64_t blocks, const float *base, Floats *total) {
#pragma GCC unroll UNROLL
    for (int r = 0; r < COUNT; ++r) total[r] = Floats{};
    for (int64_t b = 0; b < blocks; ++b, scores += COUNT * BLOCK) {
#pragma GCC unroll UNROLL
        for (int r = 0; r < COUNT; ++r) {
            float *at = scores + r * BLOCK;
            Floats one = powers(gemm::load<Floats>(at) - base[r]), two = powers(gemm::load<Floats>(at + 16) - base[r]);
            total[r] += one + two;
            gemm::store(at, one), gemm::store(at + 16, two);
        }
    }
}

#if defined(__AVX512BF16__)
// The same as bf16, two in the place of a float, to 2^-9 and 8e-5; the sums are those of rounded weights. With whole
// numbers n of a score and r what is left, 2^(n + r - base) is 2^r, rounded, whose exponent becomes less by base - n.
template <int COUNT>
static inline void half_exponentials(float *scores, int64_t blocks, const float *base, Floats *total) {
    constexpr float WHOLE = 12582912.0f;  // 1.5 2^23: what is added to it is rounded, and lies in its last bits
    __m512i words;
    for (int i = 0; i < 32; ++i) ((uint16_t *)&words)[i] = (uint16_t)(2 * i);
    const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
    __m512 sum[COUNT];
#pragma GCC unroll UNROLL
    for (int r = 0; r < COUNT; ++r) sum[r] = _mm512_setzero_ps();
    for (int64_t b = 0; b < blocks; ++b, scores += COUNT * BLOCK) {
#pragma GCC unroll UNROLL
        for (int r = 0; r < COUNT; ++r) {
            float *at = scores + r * BLOCK;
            __m512 least = _mm512_set1_ps(-400.0f), from = _mm512_set1_ps(WHOLE), p[2];
            __m512i less[2];
#pragma GCC unroll 2
            for (int i = 0; i < 2; ++i) {
                __m512 score = _mm512_sub_ps(_mm512_loadu_ps(at + 16 * i), _mm512_set1_ps(base[r]));
                score = _mm512_max_ps(least, score);  // a base may be as large as a mask's least number
                __m512 n = _mm512_sub_ps(from, score), rest = _mm512_sub_ps(score, _mm512_sub_ps(from, n));
                less[i] = _mm512_castps_si512(n);
                p[i] = _mm512_fmadd_ps(_mm512_set1_ps(5.517033860087395e-2f), rest, _mm512_set1_ps(2.42620587348938e-1f));
                p[i] = _mm512_fmadd_ps(p[i], rest, _mm512_set1_ps(6.932619214057922e-1f));
                p[i] = _mm512_fmadd_ps(p[i], rest, _mm512_set1_ps(9.999275207519531e-1f));
            }
            __m512i exponents = _mm512_slli_epi16(_mm512_permutex2var_epi16(less[0], words, less[1]), 7);
            __m512i made = _mm512_subs_epu16((__m512i)_mm512_cvtne2ps_pbh(p[1], p[0]), exponents);
            sum[r] = _mm512_dpbf16_ps(sum[r], (__m512bh)made, ones);
            _mm512_storeu_si512(at, made);
        }
    }
#pragma GCC unroll UNROLL
    for (int r = 0; r < COUNT; ++r) total[r] = (Floats)sum[r];
}
#endif

// -- rows together -------------------------------------------------------------------------------

template <bool SUM>
static inline __attribute__((always_inline)) Floats meet(Floats a, Floats b) {
    return SUM ? a + b : larger(a, b);
}

// The sum or the largest of each of 8 vectors, in the lanes 2 r and 2 r + 1; of rows there are not, the first one's.
template <bool SUM, int COUNT>
static inline __attribute__((always_inline)) Floats across(const Floats *v) {
    const Ints low8 = {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23}, high8 = low8 + 8;
    const Ints low4 = {0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27}, high4 = low4 + 4;
    const Ints low2 = {0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29}, high2 = low2 + 2;
    const Ints turned = {1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14};
    Floats eight[4], four[2];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        Floats a = v[2 * i < COUNT ? 2 * i : 0], b = v[2 * i + 1 < COUNT ? 2 * i + 1 : 0];
        eight[i] = meet<SUM>(__builtin_shuffle(a, b, low8), __builtin_shuffle(a, b, high8));
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
        Floats a = eight[2 * i], b = eight[2 * i + 1];
        four[i] = meet<SUM>(__builtin_shuffle(a, b, low4), __builtin_shuffle(a, b, high4));
    }
    Floats two = meet<SUM>(__builtin_shuffle(four[0], four[1], low2), __builtin_shuffle(four[0], four[1], high2));
    return meet<SUM>(two, __builtin_shuffle(two, turned));
}

// Lanes 2 r to places r.
static inline __attribute__((always_inline)) void spread(Floats lanes, float (&to)[ROWS]) {
    for (int r = 0; r < ROWS; ++r) to[r] = lanes[2 * r];
}

// What the softmax of COUNT rows knows so far, in lanes as `across` leaves them; `top` is a whole number.
struct State {
    Floats top = gemm::each(-__builtin_inff()), total = {};
};

// What scores are taken less, and what sums so far are multiplied by, since rows have larger scores now.
struct Growth {
    Floats factor;
    float base[ROWS], grown[ROWS];
};

// Takes in the largest scores of COUNT rows, those of each lane.
template <int COUNT>
static inline __attribute__((always_inline)) void grow(Floats &top, const Floats *most, Growth &growth) {
    Floats none = gemm::each(-__builtin_inff()), before = top;
    top = larger(whole(across<false, COUNT>(most)), before);
    Floats base = top == none ? Floats{} : top;
    growth.factor = before == none ? Floats{} : powers(before - base);
    spread(base, growth.base), spread(growth.factor, growth.grown);
}

// Takes in scores of `blocks` of 32 keys: weights in their place.
template <typename F, int COUNT>
static inline __attribute__((always_inline)) void take(Floats &total, float *scores, int64_t blocks,
                                                       const Growth &growth) {
    Floats sums[COUNT];
#if defined(__AVX512BF16__)
    if constexpr (F::HALF)
        half_exponentials<COUNT>(scores, blocks, growth.base, sums);
    else
#endif
        exponentials<COUNT>(scores, blocks, growth.base, sums);
    total = total * growth.factor + across<true, COUNT>(sums);
}

// What the weighted sums of COUNT rows are multiplied by at the end.
template <typename F, int COUNT>
static inline __attribute__((always_inline)) void last_factors(const Sizes &s, const float *sinks, const Row *own,
                                                               State state, float (&factors)[ROWS]) {
    Floats factor = gemm::each(1.0f), total = state.total;
    if constexpr (F::SINKS) {
        Floats sink = {};
        for (int r = 0; r < COUNT; ++r) sink[2 * r] = sinks[own[r].head] * LOG2E;
        factor = sink > state.top ? powers(state.top - sink) : factor;
        total = total * factor + powers(sink > state.top ? Floats{} : sink - state.top);
    }
    Floats inverse = factor / total;
    if constexpr (F::SAFE) inverse = total > 0.0f || total != total ? inverse : Floats{};
    spread(inverse, factors);
}

}  // namespace attention
