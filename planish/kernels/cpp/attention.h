// softmax(cap(scale q k^T) + mask) v on rows as they lie in memory.
//
// The rows of queries that share a key head are taken eight at a time: their scores against 512 keys, exponentials of
// base 2, weighted sums of the values; then the next 512, with the sums so far multiplied by what the largest score has
// grown (online softmax, arXiv 2205.14135). Keys are turned once for each key head, so that 16 of them lie together.
//
//     Float    products in float32
//     Half     q, k, v and the weights of the softmax rounded to bf16, products of pairs, float32 sums (AVX-512 BF16)
//
// Four rows and fewer read keys and values just once, straight from where they lie, in float32.
#include "attention_tiles.h"

namespace attention {

// -- softmax -------------------------------------------------------------------------------------

// A mask's number in base 2. The least float, which stands for "masked", stays finite: a row of nothing else weighs all
// keys alike; only minus infinity leaves a key out.
static inline __attribute__((always_inline)) float based(float mask) {
    float least = mask == -__builtin_inff() ? mask : -3.3e38f;
    return row::maximum(mask * LOG2E, least);
}

// Scores of a row against `count` keys from `start` on, of base 2; returns the largest.
template <typename F>
static float weigh(const Sizes &s, const void *mask, int64_t batch, Row own, int64_t start, int64_t count,
                   float *scores, float top) {
    if constexpr (F::CAPPED) {
        float inverse = s.scale / s.softcap, factor = s.softcap * LOG2E;
#pragma omp simd
        for (int j = 0; j < (int)count; ++j) {
            float u = scores[j] * inverse, e = power(-2.0f * LOG2E * row::absolute(u));
            float bent = (1.0f - e) / (1.0f + e), near = u - u * u * u * 0.33333333f;
            scores[j] = factor * (row::absolute(u) < 0.02f ? near : __builtin_copysignf(bent, u));
        }
    }
    if constexpr (sizeof(typename F::M) == 1) {
        const uint8_t *line = (const uint8_t *)mask + batch * s.mask[0] + own.head * s.mask[1] + own.place * s.mask[2];
        line += start * s.mask[3];
        if (s.mask[3] == 1) {
#pragma omp simd
            for (int j = 0; j < (int)count; ++j) scores[j] = line[j] ? scores[j] : -__builtin_inff();
        } else if (!*line) {
            for (int j = 0; j < (int)count; ++j) scores[j] = -__builtin_inff();
        }
    } else if constexpr (sizeof(typename F::M) < 8) {
        using M = typename F::M;
        const M *line = (const M *)mask + batch * s.mask[0] + own.head * s.mask[1] + own.place * s.mask[2];
        line += start * s.mask[3];
        int64_t step = s.mask[3];
        if (step == 1) {
#pragma omp simd
            for (int j = 0; j < (int)count; ++j) scores[j] += based(row::wide(line[j]));
        } else {
            for (int j = 0; j < (int)count; ++j) scores[j] += based(row::wide(*line));
        }
    }
    if constexpr (F::CAUSAL) {
        for (int64_t j = own.place + 1 > start ? own.place + 1 - start : 0; j < count; ++j)
            scores[j] = -__builtin_inff();
    }
    int whole = padded(count);
    for (int j = (int)count; j < whole; ++j) scores[j] = -__builtin_inff();
#if defined(__AVX512F__)
    __m512 most = _mm512_loadu_ps(scores), other = _mm512_loadu_ps(scores + 16);
    for (int j = 32; j < whole; j += 32) {
        most = _mm512_max_ps(_mm512_loadu_ps(scores + j), most);
        other = _mm512_max_ps(_mm512_loadu_ps(scores + j + 16), other);
    }
    return row::maximum(_mm512_reduce_max_ps(_mm512_max_ps(most, other)), top);
#else
#pragma omp simd reduction(max : top)
    for (int j = 0; j < whole; ++j) top = row::maximum(scores[j], top);
    return top;
#endif
}

#if defined(__AVX512F__)
// `power` of 16 numbers; what is no number stays none. LOW: to 8e-5, for weights that are rounded to bf16.
template <bool LOW>
static inline __attribute__((always_inline)) __m512 powers(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-160.0f), x);
    __m512 n = _mm512_roundscale_ps(x, 0), r = _mm512_sub_ps(x, n), p;
    if (LOW) {
        p = _mm512_fmadd_ps(_mm512_set1_ps(5.517033860087395e-2f), r, _mm512_set1_ps(2.42620587348938e-1f));
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.932619214057922e-1f));
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.999275207519531e-1f));
    } else {
        p = _mm512_fmadd_ps(_mm512_set1_ps(1.327624311670661e-3f), r, _mm512_set1_ps(9.675770066678524e-3f));
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.550715699791908e-2f));
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.4022115767002106e-1f));
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.931469440460205e-1f));
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    }
    return _mm512_scalef_ps(p, n);
}
#endif

// Weights 2^(score - top) in place, of `count` keys filled up to a multiple of 32; returns their sum. Half: as bf16, two
// in the place of a float.
template <typename F>
static inline float exponentials(float *scores, int64_t count, float top) {
    int whole = padded(count);
#if defined(__AVX512F__)
    __m512 shift = _mm512_set1_ps(top), sum = _mm512_setzero_ps(), more = sum;
    for (int j = 0; j < whole; j += 32) {
        __m512 a = powers<F::HALF>(_mm512_sub_ps(_mm512_loadu_ps(scores + j), shift));
        __m512 b = powers<F::HALF>(_mm512_sub_ps(_mm512_loadu_ps(scores + j + 16), shift));
        sum = _mm512_add_ps(sum, a), more = _mm512_add_ps(more, b);
#if defined(__AVX512BF16__)
        if constexpr (F::HALF) {
            gemm::store(scores + j / 2, (Words)_mm512_cvtne2ps_pbh(b, a));
            continue;
        }
#endif
        _mm512_storeu_ps(scores + j, a), _mm512_storeu_ps(scores + j + 16, b);
    }
    return _mm512_reduce_add_ps(_mm512_add_ps(sum, more));
#else
    float total = 0.0f;
#pragma omp simd reduction(+ : total)
    for (int j = 0; j < whole; ++j) {
        float weight = power(scores[j] - top);
        total += weight;
        scores[j] = weight;
    }
    return total;
#endif
}

// The result of a row from its weighted sums.
template <typename F>
static inline void finish(const Sizes &s, const float *sinks, int64_t batch, Row own, float top, float total,
                          const float *sums, typename F::T *out) {
    float factor = 1.0f;
    if constexpr (F::SINKS) {
        float sink = sinks[own.head] * LOG2E;
        if (sink > top) factor = power(top - sink), total *= factor, top = sink;
        total += power(sink - top);
    }
    float inverse = F::SAFE && !(total > 0.0f) && total == total ? 0.0f : factor / total;
    typename F::T *to = out + batch * s.out[0] + own.head * s.out[1] + own.place * s.out[2];
#pragma omp simd
    for (int e = 0; e < F::E; ++e) to[e] = row::narrow<typename F::T>(sums[e] * inverse);
}

// -- a key head ----------------------------------------------------------------------------------

static inline Row row_at(const Sizes &s, int64_t head, int64_t index) {
    return Row{head * (s.heads / s.shared) + index / s.rows, index % s.rows};
}

static inline Row after(const Sizes &s, Row own) {
    return own.place + 1 < s.rows ? Row{own.head, own.place + 1} : Row{own.head + 1, 0};
}

template <typename F>
static inline const typename F::T *query(const Sizes &s, const typename F::T *q, int64_t batch, Row own) {
    return q + batch * s.q[0] + own.head * s.q[1] + own.place * s.q[2];
}

// Rows first .. last of those that share a key head (heads after each other).
template <typename F>
static void many(const Sizes &s, const typename F::T *q, const typename F::T *k, const typename F::T *v,
                 const void *mask, const float *sinks, typename F::T *out, int64_t batch, int64_t head, int64_t first,
                 int64_t last, float *scratch) {
    constexpr int D = F::D, WIDTH = F::WIDTH, DEPTH = F::HALF ? F::DEPTH / 2 : F::D;
    const typename F::T *keys = k + batch * s.k[0] + head * s.k[1], *values = v + batch * s.v[0] + head * s.v[1];
    int64_t whole = (s.keys + 31) / 32 * 32, reach = s.keys;
    if (F::CAUSAL && s.heads == s.shared && last < s.keys) reach = last;
    float *turned = scratch, *packed = turned + whole * F::DEPTH;
    float *left = packed + (F::PACKS_VALUES ? whole * WIDTH : 0), *scores = left + ROWS * F::DEPTH;
    float *sums = scores + ROWS * KEYS;
    pack_keys<F>(keys, s.k[2], reach, turned);
    const float *right = (const float *)values;
    int64_t step = F::HALF ? WIDTH : s.v[2];
    if constexpr (F::PACKS_VALUES) {
        pack_values<F>(values, s.v[2], reach, packed);
        right = packed, step = WIDTH;
    }
    float factor = F::CAPPED ? 1.0f : s.scale * LOG2E;
    for (int64_t start = first; start < last; start += ROWS) {
        Row own[ROWS];
        float top[ROWS], total[ROWS];
        int64_t far = 0;
        for (int r = 0; r < ROWS; ++r) {
            own[r] = r == 0 ? row_at(s, head, start) : start + r < last ? after(s, own[r - 1]) : own[r - 1];
            top[r] = -__builtin_inff(), total[r] = 0.0f;
            far = own[r].place + 1 > far ? own[r].place + 1 : far;
            const typename F::T *line = query<F>(s, q, batch, own[r]);
            float *to = left + r * DEPTH;
            if constexpr (F::HALF) {
                bf16_t *pairs = (bf16_t *)to;
#pragma omp simd
                for (int d = 0; d < D; ++d) pairs[d] = row::narrow<bf16_t>(row::wide(line[d]) * factor);
                for (int d = D; d < F::DEPTH; ++d) pairs[d] = row::narrow<bf16_t>(0.0f);
            } else {
#pragma omp simd
                for (int d = 0; d < D; ++d) to[d] = row::wide(line[d]) * factor;
            }
        }
        for (int j = 0; j < ROWS * WIDTH; ++j) sums[j] = 0.0f;
        int64_t end = F::CAUSAL && far < s.keys ? far : s.keys;
        for (int64_t from = 0; from < end; from += KEYS) {
            int64_t count = end - from < KEYS ? end - from : KEYS;
            for (int64_t j = 0; j < count; j += 32)
                tile<F::HALF, false>(left, DEPTH, turned + (from + j) * DEPTH, 32, DEPTH, scores + j, KEYS, 32);
            for (int r = 0; r < ROWS; ++r) {
                float *line = scores + r * KEYS;
                float most = weigh<F>(s, mask, batch, own[r], from, count, line, top[r]);
                float base = most == -__builtin_inff() ? 0.0f : most;
                float grown = top[r] == -__builtin_inff() ? 0.0f : power(top[r] - base);
                total[r] = total[r] * grown + exponentials<F>(line, count, base);
                top[r] = most;
                if (from > 0)
                    for (int e = 0; e < WIDTH; ++e) sums[r * WIDTH + e] *= grown;
            }
            const float *value = right + (F::HALF ? from / 2 : from) * step;
            for (int e = 0; e < WIDTH; e += 32)
                tile<F::HALF, true>(scores, KEYS, value + e, step, F::HALF ? (count + 1) / 2 : count, sums + e, WIDTH,
                                    WIDTH - e);
        }
        for (int r = 0; r < ROWS && start + r < last; ++r)
            finish<F>(s, sinks, batch, own[r], top[r], total[r], sums + r * WIDTH, out);
    }
}

// COUNT rows against keys and values as they lie.
template <typename F, int COUNT>
static void few(const Sizes &s, const typename F::T *q, const typename F::T *k, const typename F::T *v,
                const void *mask, const float *sinks, typename F::T *out, int64_t batch, int64_t head, float *scratch) {
    using Wide = Form<typename F::T, typename F::M, F::D, F::E, false, F::CAUSAL, F::SAFE, F::CAPPED, F::SINKS>;
    constexpr int D = F::D, E = F::E, WIDTH = F::WIDTH;
    const typename F::T *keys = k + batch * s.k[0] + head * s.k[1], *values = v + batch * s.v[0] + head * s.v[1];
    float *left = scratch, *scores = left + COUNT * F::DEPTH, *sums = scores + COUNT * KEYS;
    float factor = F::CAPPED ? 1.0f : s.scale * LOG2E;
    float top[COUNT], total[COUNT];
    Row own[COUNT];
    for (int r = 0; r < COUNT; ++r) {
        own[r] = row_at(s, head, r);
        top[r] = -__builtin_inff(), total[r] = 0.0f;
        const typename F::T *line = query<F>(s, q, batch, own[r]);
        for (int d = 0; d < D; ++d) left[r * F::DEPTH + d] = row::wide(line[d]) * factor;
    }
    for (int j = 0; j < COUNT * WIDTH; ++j) sums[j] = 0.0f;
    for (int64_t from = 0; from < s.keys; from += KEYS) {
        int64_t count = s.keys - from < KEYS ? s.keys - from : KEYS;
        for (int64_t j = 0; j < count; ++j) {
            const typename F::T *line = keys + (from + j) * s.k[2];
            Floats held[COUNT] = {};
            int d = 0;
            for (; d + 16 <= D; d += 16) {
                Floats key = gemm::wide16(line + d);
#pragma GCC unroll 4
                for (int r = 0; r < COUNT; ++r)
                    held[r] = gemm::fused(key, gemm::load<Floats>(left + r * F::DEPTH + d), held[r]);
            }
#pragma GCC unroll 4
            for (int r = 0; r < COUNT; ++r) {
#if defined(__AVX512F__)
                float sum = _mm512_reduce_add_ps((__m512)held[r]);
#else
                float sum = 0.0f;
                for (int i = 0; i < 16; ++i) sum += held[r][i];
#endif
                for (int i = d; i < D; ++i) sum += row::wide(line[i]) * left[r * F::DEPTH + i];
                scores[r * KEYS + j] = sum;
            }
        }
        for (int r = 0; r < COUNT; ++r) {
            float *line = scores + r * KEYS;
            float most = weigh<Wide>(s, mask, batch, own[r], from, count, line, top[r]);
            float base = most == -__builtin_inff() ? 0.0f : most;
            float grown = top[r] == -__builtin_inff() ? 0.0f : power(top[r] - base);
            total[r] = total[r] * grown + exponentials<Wide>(line, count, base);
            top[r] = most;
            for (int e = 0; e < WIDTH; ++e) sums[r * WIDTH + e] *= grown;
        }
        const typename F::T *line = values + from * s.v[2];
        int e = 0;
        for (; e + 32 <= E; e += 32) {
            Floats held[COUNT][2] = {};
            for (int64_t j = 0; j < count; ++j) {
                Floats a = gemm::wide16(line + j * s.v[2] + e), b = gemm::wide16(line + j * s.v[2] + e + 16);
#pragma GCC unroll 4
                for (int r = 0; r < COUNT; ++r) {
                    held[r][0] = add<false>(held[r][0], a, scores + r * KEYS + j);
                    held[r][1] = add<false>(held[r][1], b, scores + r * KEYS + j);
                }
            }
            for (int r = 0; r < COUNT; ++r) {
                float *to = sums + r * WIDTH + e;
                gemm::store(to, gemm::load<Floats>(to) + held[r][0]);
                gemm::store(to + 16, gemm::load<Floats>(to + 16) + held[r][1]);
            }
        }
        for (; e + 16 <= E; e += 16) {
            Floats held[COUNT] = {};
            for (int64_t j = 0; j < count; ++j) {
                Floats a = gemm::wide16(line + j * s.v[2] + e);
#pragma GCC unroll 4
                for (int r = 0; r < COUNT; ++r) held[r] = add<false>(held[r], a, scores + r * KEYS + j);
            }
            for (int r = 0; r < COUNT; ++r) {
                float *to = sums + r * WIDTH + e;
                gemm::store(to, gemm::load<Floats>(to) + held[r]);
            }
        }
        for (; e < E; ++e)
            for (int r = 0; r < COUNT; ++r)
                for (int64_t j = 0; j < count; ++j)
                    sums[r * WIDTH + e] += scores[r * KEYS + j] * row::wide(line[j * s.v[2] + e]);
    }
    for (int r = 0; r < COUNT; ++r) finish<F>(s, sinks, batch, own[r], top[r], total[r], sums + r * WIDTH, out);
}

// All of it. Threads take key heads, or parts of the rows of one where there are few of them.
template <typename F>
static void run(const Sizes &s, const typename F::T *q, const typename F::T *k, const typename F::T *v,
                const void *mask, const float *sinks, typename F::T *out, int threads) {
    int64_t rows = s.rows * (s.heads / s.shared), units = s.batch * s.shared, parts = 1;
    if (!rows || !units) return;
    while (units * parts < 2 * threads && threads > 1 && rows / (parts * 2) >= 64) parts *= 2;
    int64_t share = (rows + parts - 1) / parts;
    share = (share + ROWS - 1) / ROWS * ROWS;
#pragma omp parallel num_threads(threads) if (threads > 1 && units * parts > 1 && units * rows * s.keys * F::D > 65536)
    {
        float *held = row::scratch(scratch<F>(s.keys));
#pragma omp for schedule(dynamic, 1)
        for (int64_t unit = 0; unit < units * parts; ++unit) {
            int64_t one = unit / parts, batch = one / s.shared, head = one % s.shared;
            int64_t first = unit % parts * share, last = first + share < rows ? first + share : rows;
            if (rows == 1) {
                few<F, 1>(s, q, k, v, mask, sinks, out, batch, head, held);
            } else if (rows == 2) {
                few<F, 2>(s, q, k, v, mask, sinks, out, batch, head, held);
            } else if (rows <= 4) {
                rows == 3 ? few<F, 3>(s, q, k, v, mask, sinks, out, batch, head, held)
                          : few<F, 4>(s, q, k, v, mask, sinks, out, batch, head, held);
            } else if (first < last) {
                many<F>(s, q, k, v, mask, sinks, out, batch, head, first, last, held);
            }
        }
    }
}

}  // namespace attention
