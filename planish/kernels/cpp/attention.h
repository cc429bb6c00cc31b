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
//
// Keys at the end that a bool mask keeps from all rows in question are left out: padding, the empty places of a cache,
// what lies behind the rows of a mask that is causal.
#include "attention_softmax.h"

namespace attention {

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

template <typename F>
static inline typename F::T *result(const Sizes &s, typename F::T *out, int64_t batch, Row own) {
    return out + batch * s.out[0] + own.head * s.out[1] + own.place * s.out[2];
}

// A row of a query times a factor, as tiles read it.
template <typename F>
static inline void pack_query(const typename F::T *line, float factor, float *to) {
#pragma GCC unroll 4
    for (int d = 0; d < F::DEPTH; d += 32) {
        Floats a = part16(line + d, F::D - d) * factor, b = part16(line + d + 16, F::D - d - 16) * factor;
#if defined(__AVX512BF16__)
        if constexpr (F::HALF) {
            gemm::store(to + d / 2, (Words)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a));
            continue;
        }
#endif
        gemm::store(to + d, a), gemm::store(to + d + 16, b);
    }
}

// Weighted sums of the values of `keys` keys in COLUMNS vectors from column e on. FIRST: no sums so far; LAST: the result.
template <typename F, int COLUMNS>
static inline __attribute__((always_inline)) void sum_values(const float *weights, int64_t keys, const float *value,
                                                             int64_t step, int e, bool first, const float *grown,
                                                             const float *factors, float *sums,
                                                             typename F::T *const *to, int rows) {
    Floats held[ROWS][2] = {};
    for (; keys > 0; keys -= BLOCK, weights += ROWS * BLOCK, value += (F::HALF ? BLOCK / 2 : BLOCK) * step) {
        int64_t count = keys < BLOCK ? keys : BLOCK;
        tile<F::HALF, ROWS, COLUMNS>(weights, BLOCK, value, step, F::HALF ? (count + 1) / 2 : count, held);
    }
#pragma GCC unroll UNROLL
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 2
        for (int c = 0; c < COLUMNS; ++c) {
            float *own = sums + r * F::WIDTH + e + 16 * c;
            if (!first) held[r][c] = gemm::fused(gemm::load<Floats>(own), gemm::each(grown[r]), held[r][c]);
            if (!factors)
                gemm::store(own, held[r][c]);
            else if (r < rows)
                put16(to[r] + e + 16 * c, held[r][c] * factors[r], F::E - e - 16 * c);
        }
    }
}

// Keys and values of a key head as tiles read them, and what all of its rows need.
template <typename F>
struct Head {
    const Sizes &s;
    const typename F::T *q;
    const void *mask;
    typename F::T *out;
    const float *turned, *right;
    int64_t batch, head, last, keys, step;
    float factor;
    bool open, alike;  // of the mask
};

// Eight rows against up to 512 keys: from their scores on until their weighted sums.
template <typename F>
struct Batch {
    Row own[ROWS];
    typename F::T *to[ROWS];
    float *scores;
    int64_t start, end, from, count, blocks;
    State state;
    Growth growth;
};

// The rows from `batch.start` on: where they are and how far they look, and themselves as tiles read them. In bf16 they
// are not scaled: they would be rounded once more.
template <typename F>
static inline __attribute__((always_inline)) void take_rows(const Head<F> &h, Batch<F> &batch, float *left) {
    const Sizes &s = h.s;
    Row at = row_at(s, h.head, batch.start);
    bool together = batch.start + ROWS <= h.last && at.place + ROWS <= s.rows;
    int64_t far = 0;
#pragma GCC unroll UNROLL
    for (int r = 0; r < ROWS; ++r) {
        Row own = together ? Row{at.head, at.place + r} : at;
        if (!together && batch.start + r + 1 < h.last) at = after(s, at);
        far = own.place + 1 > far ? own.place + 1 : far;
        batch.own[r] = own, batch.to[r] = result<F>(s, h.out, h.batch, own);
        pack_query<F>(query<F>(s, h.q, h.batch, own), F::SCALED ? h.factor : 1.0f, left + r * F::APART);
    }
    batch.end = F::CAUSAL && far < h.keys ? far : h.keys;
    if constexpr (sizeof(typename F::M) == 1) {
        if (!h.alike) batch.end = last_seen<ROWS>(s, h.mask, h.batch, batch.own, batch.end);
    }
    batch.state.top = gemm::each(-__builtin_inff());
}

// Their scores against the keys from `batch.from` on.
template <typename F>
static inline __attribute__((always_inline)) void score(const Head<F> &h, Batch<F> &batch, const float *left) {
    constexpr int DEPTH = F::HALF ? F::DEPTH / 2 : F::D;
    batch.count = batch.end - batch.from < KEYS ? batch.end - batch.from : KEYS;
    batch.blocks = (batch.count + BLOCK - 1) / BLOCK;
    Floats most[ROWS];
    for (int r = 0; r < ROWS; ++r) most[r] = gemm::each(-__builtin_inff());
    for (int64_t b = 0; b < batch.blocks; ++b) {
        int64_t at = batch.from + b * BLOCK, rest = batch.count - b * BLOCK, count = rest < BLOCK ? rest : BLOCK;
        Floats made[ROWS][2] = {};
        tile<F::HALF, ROWS, 2>(left, F::APART, h.turned + at * DEPTH, BLOCK, DEPTH, made);
        if constexpr (!F::SCALED && !F::CAPPED) {
#pragma GCC unroll UNROLL
            for (int r = 0; r < ROWS; ++r) made[r][0] *= h.factor, made[r][1] *= h.factor;
        }
        weigh<F, ROWS>(h.s, h.mask, h.open, h.alike, h.batch, batch.own, at, count, made,
                       batch.scores + b * ROWS * BLOCK, most);
    }
    grow<ROWS>(batch.state.top, most, batch.growth);
}

// Their weights and, with those, sums of values; `total` and `sums` are those so far.
template <typename F>
static inline __attribute__((always_inline)) void weigh_values(const Head<F> &h, Batch<F> &batch, const float *sinks,
                                                               Floats &total, float *sums) {
    bool first = batch.from == 0, final = batch.from + KEYS >= batch.end;
    if (first) total = Floats{};
    take<F, ROWS>(total, batch.scores, batch.blocks, batch.growth);
    float factors[ROWS];
    if (final) last_factors<F, ROWS>(h.s, sinks, batch.own, State{batch.state.top, total}, factors);
    const float *value = h.right + (F::HALF ? batch.from / 2 : batch.from) * h.step, *scale = final ? factors : nullptr;
    int rows = h.last - batch.start < ROWS ? (int)(h.last - batch.start) : ROWS, e = 0;
    for (; e + 32 <= F::WIDTH; e += 32)
        sum_values<F, 2>(batch.scores, batch.count, value + e, h.step, e, first, batch.growth.grown, scale, sums,
                         batch.to, rows);
    if (e < F::WIDTH)
        sum_values<F, 1>(batch.scores, batch.count, value + e, h.step, e, first, batch.growth.grown, scale, sums,
                         batch.to, rows);
}

// Rows first .. last of those that share a key head (heads after each other). The scores of the next eight are computed
// before the weights of these: what a row waits for, the largest of its scores, is there by then.
template <typename F>
static void many(const Sizes &s, const typename F::T *q, const typename F::T *k, const typename F::T *v,
                 const void *mask, const float *sinks, typename F::T *out, int64_t batch, int64_t head, int64_t first,
                 int64_t last, float *scratch) {
    const typename F::T *keys = k + batch * s.k[0] + head * s.k[1], *values = v + batch * s.v[0] + head * s.v[1];
    int64_t whole = (s.keys + 31) / 32 * 32, end = reach<F>(s, mask, batch, head);
    if (F::CAUSAL && s.heads == s.shared && last < end) end = last;
    float *turned = scratch, *packed = turned + whole * F::DEPTH;
    float *left = packed + (F::PACKS_VALUES ? whole * F::WIDTH : 0), *scores = left + ROWS * F::DEPTH;
    float *sums = scores + 2 * ROWS * KEYS;
    pack_keys<F>(keys, s.k[2], end, turned);
    Head<F> h{s, q, mask, out, turned, (const float *)values, batch, head, last, end,
              F::HALF ? F::WIDTH : s.v[2], F::CAPPED ? 1.0f : s.scale * LOG2E, open<F>(s, mask, batch, head), alike(s)};
    if constexpr (F::PACKS_VALUES) {
        pack_values<F>(values, s.v[2], end, packed);
        h.right = packed, h.step = F::WIDTH;
    }
    Batch<F> two[2];
    two[0].scores = scores, two[1].scores = scores + ROWS * KEYS;
    two[0].start = first, two[0].from = 0;
    take_rows<F>(h, two[0], left);
    score<F>(h, two[0], left);
    Floats total = {};
    for (int now = 0;; now = 1 - now) {
        Batch<F> &one = two[now], &next = two[1 - now];
        bool more = one.from + KEYS < one.end;
        if (more) {
            float *own = next.scores;
            next = one;
            next.scores = own, next.from += KEYS;
        } else {
            next.start = one.start + ROWS, next.from = 0;
            if (next.start < last) take_rows<F>(h, next, left);
        }
        if (next.start < last) score<F>(h, next, left);
        weigh_values<F>(h, one, sinks, total, sums);
        if (next.start >= last) break;
    }
}

// Four rows and fewer: the form in float32.
template <typename F>
using Wide = Form<typename F::T, typename F::M, F::D, F::E, false, F::CAUSAL, F::SAFE, F::CAPPED, F::SINKS>;

// The weight of a key in a row of COUNT.
template <int COUNT>
static inline __attribute__((always_inline)) const float *few_weight(const float *scores, int r, int64_t j) {
    return scores + (j / BLOCK * COUNT + r) * BLOCK + j % BLOCK;
}

// Weighted sums of COUNT rows in COLUMNS vectors of the values as they lie.
template <typename F, int COUNT, int COLUMNS>
static inline __attribute__((always_inline)) void few_values(const float *scores, int64_t count,
                                                             const typename F::T *line, int64_t step, float *sums) {
    Floats held[COUNT][COLUMNS] = {};
    for (int64_t j = 0; j < count; ++j) {
        const float *weight = few_weight<COUNT>(scores, 0, j);
#pragma GCC unroll 2
        for (int c = 0; c < COLUMNS; ++c) {
            Floats value = gemm::wide16(line + j * step + 16 * c);
#pragma GCC unroll 4
            for (int r = 0; r < COUNT; ++r) held[r][c] = add<false>(held[r][c], value, weight + r * BLOCK);
        }
    }
    for (int r = 0; r < COUNT; ++r) {
        for (int c = 0; c < COLUMNS; ++c) {
            float *to = sums + r * F::WIDTH + 16 * c;
            gemm::store(to, gemm::load<Floats>(to) + held[r][c]);
        }
    }
}

// COUNT rows against keys and values as they lie.
template <typename F, int COUNT>
static void few(const Sizes &s, const typename F::T *q, const typename F::T *k, const typename F::T *v,
                const void *mask, const float *sinks, typename F::T *out, int64_t batch, int64_t head, float *scratch) {
    constexpr int D = F::D, E = F::E, WIDTH = F::WIDTH;
    const typename F::T *keys = k + batch * s.k[0] + head * s.k[1], *values = v + batch * s.v[0] + head * s.v[1];
    float *left = scratch, *scores = left + COUNT * F::DEPTH, *sums = scores + COUNT * KEYS;
    float factor = F::CAPPED ? 1.0f : s.scale * LOG2E;
    bool unmasked = open<F>(s, mask, batch, head), same = alike(s);
    int64_t end = reach<F>(s, mask, batch, head);
    Row own[COUNT];
    State state;
    for (int r = 0; r < COUNT; ++r) {
        own[r] = row_at(s, head, r);
        const typename F::T *line = query<F>(s, q, batch, own[r]);
        for (int d = 0; d < D; ++d) left[r * F::DEPTH + d] = row::wide(line[d]) * factor;
    }
    for (int j = 0; j < COUNT * WIDTH; ++j) sums[j] = 0.0f;
    for (int64_t from = 0; from < end; from += KEYS) {
        int64_t count = end - from < KEYS ? end - from : KEYS, blocks = (count + BLOCK - 1) / BLOCK;
        Floats most[COUNT];
        for (int r = 0; r < COUNT; ++r) most[r] = gemm::each(-__builtin_inff());
        for (int64_t b = 0; b < blocks; ++b) {
            float *block = scores + b * COUNT * BLOCK;
            int64_t at = from + b * BLOCK, own_count = count - b * BLOCK < BLOCK ? count - b * BLOCK : BLOCK;
            for (int64_t j = 0; j < own_count; ++j) {
                const typename F::T *line = keys + (at + j) * s.k[2];
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
                    block[r * BLOCK + j] = sum;
                }
            }
            Floats made[COUNT][2];
            for (int r = 0; r < COUNT; ++r) {
                made[r][0] = gemm::load<Floats>(block + r * BLOCK);
                made[r][1] = gemm::load<Floats>(block + r * BLOCK + 16);
            }
            weigh<Wide<F>, COUNT>(s, mask, unmasked, same, batch, own, at, own_count, made, block, most);
        }
        Growth growth;
        grow<COUNT>(state.top, most, growth);
        take<Wide<F>, COUNT>(state.total, scores, blocks, growth);
        for (int r = 0; r < COUNT; ++r)
            for (int e = 0; e < WIDTH; ++e) sums[r * WIDTH + e] *= growth.grown[r];
        const typename F::T *line = values + from * s.v[2];
        int e = 0;
        for (; e + 32 <= E; e += 32) few_values<F, COUNT, 2>(scores, count, line + e, s.v[2], sums + e);
        for (; e + 16 <= E; e += 16) few_values<F, COUNT, 1>(scores, count, line + e, s.v[2], sums + e);
        for (; e < E; ++e)
            for (int r = 0; r < COUNT; ++r)
                for (int64_t j = 0; j < count; ++j)
                    sums[r * WIDTH + e] += few_weight<COUNT>(scores, r, j)[0] * row::wide(line[j * s.v[2] + e]);
    }
    float factors[ROWS];
    last_factors<F, COUNT>(s, sinks, own, state, factors);
    for (int r = 0; r < COUNT; ++r) {
        typename F::T *to = result<F>(s, out, batch, own[r]);
        for (int e = 0; e < E; ++e) to[e] = row::narrow<typename F::T>(sums[r * WIDTH + e] * factors[r]);
    }
}

// All of it. Threads take key heads, or parts of the rows of one where there are few of them.
template <typename F>
static void run(const Sizes &s, const typename F::T *q, const typename F::T *k, const typename F::T *v,
                const void *mask, const float *sinks, typename F::T *out, int threads) {
    int64_t rows = s.rows * (s.heads / s.shared), units = s.batch * s.shared, parts = 1;
    if (!rows || !units) return;
    if (!s.keys) {  // a sum of nothing
        for (int64_t i = 0; i < s.batch * s.heads * s.rows * F::E; ++i) out[i] = row::narrow<typename F::T>(0.0f);
        return;
    }
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
