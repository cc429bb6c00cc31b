// Attention, its parts: sizes and forms, keys and values as tiles of products read them, the products.
#include "base.h"
#include "vectors.h"

#include <type_traits>

namespace attention {

using gemm::Floats;
using gemm::Ints;
using gemm::Words;

constexpr int ROWS = 8;      // of a tile
constexpr int BLOCK = 32;    // keys that are weighed in registers
constexpr int KEYS = 512;    // that are weighed at a time
#if defined(__AVX512F__)
constexpr int UNROLL = ROWS;  // loops over rows whose vectors stay in registers
#else
constexpr int UNROLL = 1;
#endif
constexpr float LOG2E = 1.4426950408889634f;

// Sizes, places and steps from one batch, head and row to the next, in elements; a step of 0 repeats.
struct Sizes {
    int64_t batch, heads, shared, rows, keys;  // shared: key heads
    int64_t q[3], k[3], v[3], out[3], mask[4];
    float scale, softcap;
};

// The row of a query: its head and its place among the rows.
struct Row {
    int64_t head, place;
};

// In the place of a mask's type: there is no mask.
struct None {
    int64_t none[2];
};

// What follows from the node: constants of an emitted file.
template <typename T_, typename M_, int D_, int E_, bool HALF_, bool CAUSAL_, bool SAFE_, bool CAPPED_, bool SINKS_>
struct Form {
    using T = T_;  // of q, k, v and the result
    using M = M_;  // of the mask: None, uint8_t (keep where it is not 0), or a float that is added
    static constexpr int D = D_, E = E_;
    static constexpr int WIDTH = (E + 15) / 16 * 16;   // columns of a packed value
    static constexpr int DEPTH = (D + 31) / 32 * 32;   // columns of a packed key
    static constexpr bool CAUSAL = CAUSAL_, SAFE = SAFE_, CAPPED = CAPPED_, SINKS = SINKS_;
#if defined(__AVX512BF16__)
    static constexpr bool HALF = HALF_;
#else
    static constexpr bool HALF = false;
#endif
    static constexpr bool SCALED = !HALF || !std::is_same<T, bf16_t>::value;  // queries; else their scores, later
    static constexpr int APART = HALF ? DEPTH / 2 : DEPTH;  // floats of a packed query
    static constexpr bool PACKS_VALUES = HALF || sizeof(T) != 4 || E % 16 != 0;
};

// Scratch of a thread, in floats, for so many keys; a multiple of 16.
template <typename F>
static inline int64_t scratch(int64_t keys) {
    int64_t whole = (keys + 31) / 32 * 32;
    int64_t packed = whole * F::DEPTH + (F::PACKS_VALUES ? whole * F::WIDTH : 0);
    return packed + ROWS * (F::DEPTH + 2 * KEYS + F::WIDTH) + 64;
}

// The first numbers of a row as float32, 16 or what there is of them; zeros after them.
template <typename T>
static inline __attribute__((always_inline)) Floats part16(const T *at, int columns) {
    if (columns >= 16) return gemm::wide16(at);
    T held[16] = {};
    for (int i = 0; i < columns; ++i) held[i] = at[i];
    return gemm::wide16(held);
}

// 16 numbers to memory, or as many as there are columns.
template <typename T>
static inline __attribute__((always_inline)) void put16(T *at, Floats x, int columns) {
    if constexpr (sizeof(T) == 4) {
        if (columns >= 16) return gemm::store(at, x);
    }
    for (int i = 0; i < 16 && i < columns; ++i) at[i] = row::narrow<T>(x[i]);
}

// -- packing -------------------------------------------------------------------------------------

// 16 words of 16 rows, turned: out[i][j] = in[j][i].
static inline void turn(const Words (&in)[16], Words *out) {
#if defined(__AVX512F__)
    Words a[16], b[16];
    const Words low = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
    const Words high = low + 8;
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        a[2 * i] = __builtin_shuffle(in[i], in[i + 8], low), a[2 * i + 1] = __builtin_shuffle(in[i], in[i + 8], high);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        b[2 * i] = __builtin_shuffle(a[i], a[i + 8], low), b[2 * i + 1] = __builtin_shuffle(a[i], a[i + 8], high);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        a[2 * i] = __builtin_shuffle(b[i], b[i + 8], low), a[2 * i + 1] = __builtin_shuffle(b[i], b[i + 8], high);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        out[2 * i] = __builtin_shuffle(a[i], a[i + 8], low), out[2 * i + 1] = __builtin_shuffle(a[i], a[i + 8], high);
    }
#else
    for (int i = 0; i < 16; ++i)
        for (int j = 0; j < 16; ++j) out[i][j] = in[j][i];
#endif
}

#if defined(__AVX512BF16__)
// 32 numbers as bf16, the first in the low half of the first word.
template <typename T>
static inline __attribute__((always_inline)) Words halves(const T *at) {
    return (Words)_mm512_cvtne2ps_pbh((__m512)gemm::wide16(at + 16), (__m512)gemm::wide16(at));
}

static inline __attribute__((always_inline)) Words halves(const bf16_t *at) { return gemm::load<Words>(at); }
#endif

// Keys [keys, D]: of 32 keys together column after column (Float), or pair after pair of columns (Half).
template <typename F>
static void pack_keys(const typename F::T *k, int64_t step, int64_t keys, float *packed) {
    constexpr int D = F::D, DEPTH = F::DEPTH;
    typename F::T held[DEPTH];
    for (int j = 0; j < DEPTH; ++j) held[j] = row::narrow<typename F::T>(0.0f);
    for (int64_t start = 0; start < keys; start += 16) {
        float *made = packed + start / 32 * 32 * (F::HALF ? DEPTH / 2 : D) + start % 32;
        for (int d = 0; d < DEPTH; d += F::HALF ? 32 : 16) {
            Words lines[16], turned[16];
            for (int i = 0; i < 16; ++i) {
                const typename F::T *at = k + (start + i) * step + d;
                if (start + i >= keys || d >= D) {
                    lines[i] = Words{};
                    continue;
                }
                if (d + (F::HALF ? 32 : 16) > D) {
                    for (int j = d; j < D; ++j) held[j] = at[j - d];
                    at = held + d;
                }
#if defined(__AVX512BF16__)
                if constexpr (F::HALF) {
                    lines[i] = halves(at);
                    continue;
                }
#endif
                lines[i] = (Words)gemm::wide16(at);
            }
            turn(lines, turned);
            for (int i = 0; i < 16; ++i) {
                int column = (F::HALF ? d / 2 : d) + i;
                if (column < (F::HALF ? DEPTH / 2 : D)) gemm::store(made + column * 32, turned[i]);
            }
        }
    }
}

// Values [keys, E]: rows of WIDTH floats, or rows of two keys with their numbers in pairs (Half).
template <typename F>
static void pack_values(const typename F::T *v, int64_t step, int64_t keys, float *packed) {
    constexpr int E = F::E, WIDTH = F::WIDTH;
    typename F::T held[2][WIDTH];
    for (int j = 0; j < WIDTH; ++j) held[0][j] = held[1][j] = row::narrow<typename F::T>(0.0f);
    for (int64_t s = 0; s < keys; s += F::HALF ? 2 : 1) {
        const typename F::T *one = v + s * step, *two = one + step;
        if constexpr (E % 16 != 0) {
            for (int j = 0; j < E; ++j) held[0][j] = one[j];
            one = held[0];
        }
        bool last = s + 1 >= keys;
        if (F::HALF && (last || E % 16 != 0)) {
            for (int j = 0; j < E; ++j) held[1][j] = last ? row::narrow<typename F::T>(0.0f) : two[j];
            two = held[1];
        }
#if defined(__AVX512BF16__)
        if constexpr (F::HALF) {
            const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7,
                                                   22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
            for (int e = 0; e < WIDTH; e += 16) {
                __m512bh pair = _mm512_cvtne2ps_pbh((__m512)gemm::wide16(two + e), (__m512)gemm::wide16(one + e));
                gemm::store(packed + s / 2 * WIDTH + e, (Words)_mm512_permutexvar_epi16(order, (__m512i)pair));
            }
            continue;
        }
#endif
        for (int e = 0; e < WIDTH; e += 16) gemm::store(packed + s * WIDTH + e, gemm::wide16(one + e));
    }
}

// -- products ------------------------------------------------------------------------------------

// sum + x w in each lane; Half: the two numbers of a word of w times those of x.
template <bool HALF>
static inline __attribute__((always_inline)) Floats add(Floats sum, Floats w, const float *x) {
#if defined(__AVX512BF16__)
    if constexpr (HALF) {
        int32_t pair;
        __builtin_memcpy(&pair, x, 4);
        return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)_mm512_set1_epi32(pair));
    }
#endif
    return gemm::fused(w, *x - Floats{}, sum);
}

// sums[r] += sum_i x[r][i] w[i][0 .. 16 COLUMNS) of COUNT rows; Half: over pairs.
template <bool HALF, int COUNT, int COLUMNS>
static inline __attribute__((always_inline)) void tile(const float *x, int64_t apart, const float *w, int64_t step,
                                                       int64_t count, Floats (&sums)[COUNT][2]) {
#if defined(__AVX512F__)
#pragma GCC unroll 2
    for (int64_t i = 0; i < count; ++i) {
        Floats a = gemm::load<Floats>(w + i * step), b = COLUMNS > 1 ? gemm::load<Floats>(w + i * step + 16) : a;
#pragma GCC unroll UNROLL
        for (int r = 0; r < COUNT; ++r) {
            sums[r][0] = add<HALF>(sums[r][0], a, x + r * apart + i);
            if (COLUMNS > 1) sums[r][1] = add<HALF>(sums[r][1], b, x + r * apart + i);
        }
    }
#else  // vectors of 16 are taken apart into numbers there: loops that become vectors of the machine
    for (int r = 0; r < COUNT; ++r) {
        float held[32];
        __builtin_memcpy(held, sums[r], sizeof held);
        for (int64_t i = 0; i < count; ++i) {
#pragma omp simd
            for (int j = 0; j < 16 * COLUMNS; ++j) held[j] += x[r * apart + i] * w[i * step + j];
        }
        __builtin_memcpy(sums[r], held, sizeof held);
    }
#endif
}

}  // namespace attention
