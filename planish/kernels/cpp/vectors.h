// Vectors of 16 lanes of 32 bits, a lane for each column of a panel of a weight.
//
// GCC's vector types: each operation becomes one instruction of AVX-512, and what the machine has elsewhere.
// Instructions that have no operator stand here, each with its loop for other machines.
#include <cstdint>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace gemm {

typedef float Floats __attribute__((vector_size(64), may_alias));
typedef int32_t Ints __attribute__((vector_size(64), may_alias));
typedef uint32_t Words __attribute__((vector_size(64), may_alias));

template <typename T>
static inline __attribute__((always_inline)) T load(const void *at) {
    T held;
    __builtin_memcpy(&held, at, sizeof(T));
    return held;
}

template <typename T>
static inline __attribute__((always_inline)) void store(void *at, T held) {
    __builtin_memcpy(at, &held, sizeof(T));
}

// x in each lane.
static inline __attribute__((always_inline)) Floats each(float x) {
#if defined(__AVX512F__)
    return (Floats)_mm512_set1_ps(x);
#else
    return Floats{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x};
#endif
}

static inline __attribute__((always_inline)) Floats floats(Ints x) { return __builtin_convertvector(x, Floats); }

// a b + c; one rounding where the machine can.
static inline __attribute__((always_inline)) Floats fused(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FP_FAST_FMAF)
    for (int i = 0; i < 16; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
#else
    return a * b + c;
#endif
}

// sum + w0 x0 + w1 x1 + w2 x2 + w3 x3 in each lane: w unsigned bytes of the lane, x four signed bytes for all lanes.
static inline __attribute__((always_inline)) Ints dot4(Ints sum, Words w, int32_t x) {
#if defined(__AVX512VNNI__)
    return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, _mm512_set1_epi32(x));
#else
    sum += (Ints)(w & 255) * (int32_t)(int8_t)x;
    sum += (Ints)((w >> 8) & 255) * (int32_t)(int8_t)(x >> 8);
    sum += (Ints)((w >> 16) & 255) * (int32_t)(int8_t)(x >> 16);
    return sum + (Ints)(w >> 24) * (x >> 24);
#endif
}

// sum + the four signed bytes of each lane.
static inline __attribute__((always_inline)) Ints bytes4(Ints sum, Ints x) {
#if defined(__AVX512VNNI__)
    return (Ints)_mm512_dpbusd_epi32((__m512i)sum, _mm512_set1_epi8(1), (__m512i)x);
#else
    return sum + ((Ints)((Words)x << 24) >> 24) + ((Ints)((Words)x << 16) >> 24) + ((Ints)((Words)x << 8) >> 24) + (x >> 24);
#endif
}

// The sum of all lanes.
static inline __attribute__((always_inline)) int32_t total(Ints x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_epi32((__m512i)x);
#else
    int32_t sum = 0;
    for (int i = 0; i < 16; ++i) sum += x[i];
    return sum;
#endif
}

// Codes of 4 or 2 bits, stored as unsigned ones, from bit `place` on of each lane; SIGNED: less 2^(BITS - 1).
template <int BITS, bool SIGNED>
static inline __attribute__((always_inline)) Floats codes(Words held, int place) {
    constexpr int MIDDLE = SIGNED ? 1 << (BITS - 1) : 0;
#if defined(__AVX512F__)
    if (BITS < 8) {  // a table of the low four bits of a lane; _mm512_permutexvar_ps ignores the others
        Floats table;
        for (int i = 0; i < 16; ++i) table[i] = (float)((i & ((1 << BITS) - 1)) - MIDDLE);
        return (Floats)_mm512_permutexvar_ps((__m512i)(held >> place), (__m512)table);
    }
#endif
    return floats((Ints)((held >> place) & ((1u << BITS) - 1)) - MIDDLE);
}

// `second` in the lanes whose bit `place` is set, else `first`.
static inline __attribute__((always_inline)) Floats choose(Words bits, int place, Floats first, Floats second) {
#if defined(__AVX512F__)
    __mmask16 set = _mm512_test_epi32_mask((__m512i)bits, _mm512_set1_epi32(1 << place));
    return (Floats)_mm512_mask_blend_ps(set, (__m512)first, (__m512)second);
#else
    Words set = -((bits >> place) & 1);
    return (Floats)(((Words)first & ~set) | ((Words)second & set));
#endif
}

// 16 unsigned numbers as they lie in memory, as words.
static inline __attribute__((always_inline)) Words words16(const uint8_t *at) {
#if defined(__AVX512F__)
    return (Words)_mm512_cvtepu8_epi32(load<__m128i>(at));
#else
    typedef uint8_t Narrow __attribute__((vector_size(16), may_alias));
    return __builtin_convertvector(load<Narrow>(at), Words);
#endif
}

static inline __attribute__((always_inline)) Words words16(const uint16_t *at) {
#if defined(__AVX512F__)
    return (Words)_mm512_cvtepu16_epi32(load<__m256i>(at));
#else
    typedef uint16_t Narrow __attribute__((vector_size(32), may_alias));
    return __builtin_convertvector(load<Narrow>(at), Words);
#endif
}

static inline __attribute__((always_inline)) Words words16(const uint32_t *at) { return load<Words>(at); }

// 16 numbers as they lie in memory, as float32.
static inline __attribute__((always_inline)) Floats wide16(const float *at) { return load<Floats>(at); }

static inline __attribute__((always_inline)) Floats wide16(const uint8_t *at) { return floats((Ints)words16(at)); }

static inline __attribute__((always_inline)) Floats wide16(const int8_t *at) {
#if defined(__AVX512F__)
    return floats((Ints)_mm512_cvtepi8_epi32(load<__m128i>(at)));
#else
    typedef int8_t Narrow __attribute__((vector_size(16), may_alias));
    return __builtin_convertvector(load<Narrow>(at), Floats);
#endif
}

static inline __attribute__((always_inline)) Floats wide16(const bf16_t *at) {
    return (Floats)(words16((const uint16_t *)at) << 16);
}

static inline __attribute__((always_inline)) Floats wide16(const f16_t *at) {
#if defined(__AVX512F__)
    return (Floats)_mm512_cvtph_ps(load<__m256i>(at));
#else
    Floats held;
    for (int i = 0; i < 16; ++i) held[i] = row::wide(at[i]);
    return held;
#endif
}

// Ask for memory that is read some turns later: few rows stream through a weight, and the machine alone falls behind.
template <int ROWS, int BYTES>
static inline __attribute__((always_inline)) void soon(const void *at) {
    constexpr int64_t AHEAD = 4096;
    if (ROWS > 4) return;
#pragma GCC unroll 8
    for (int line = 0; line < BYTES; line += 64) __builtin_prefetch((const char *)at + AHEAD + line);
}

// Ask for R rows of COLUMNS elements, `step` elements apart, that are read (WRITE: written) some time later.
template <int R, int COLUMNS, int WRITE, typename T>
static inline __attribute__((always_inline)) void ask(const T *at, int64_t step) {
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
        for (int line = 0; line < COLUMNS * (int)sizeof(T); line += 64) {
            __builtin_prefetch((const char *)(at + i * step) + line, WRITE);
        }
    }
}

template <typename T, int R, int C>
static inline __attribute__((always_inline)) void clear(T (&sum)[R][C]) {
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < C; ++j) sum[i][j] = T{};
    }
}

// Sums of a second chain to those of the first, if there is one.
template <int CHAINS, int R, int C, int S, int D>
static inline __attribute__((always_inline)) void add_chains(Floats (&sum)[R][C], const Floats (&more)[S][D]) {
    if constexpr (CHAINS == 2) {
#pragma GCC unroll 2
        for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
            for (int j = 0; j < C; ++j) sum[i][j] += more[i][j];
        }
    }
}

}  // namespace gemm
