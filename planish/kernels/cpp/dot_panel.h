// Many rows of bfloat16 times a panel of a weight that is decoded once for all of them, to bfloat16 pairs.
//
// A panel has C * 16 columns of the product: [K / 2][C][16] words, columns 2 k and 2 k + 1 of K in the halves of a word, as
// the activation has them. 8-bit codes less an 8-bit zero point are exact in bfloat16; clusters' scales round once.
#include <cstdint>

namespace gemm {

static inline __attribute__((always_inline)) Words pair_of(Floats low, Floats high) {
    Words a = (Words)low, b = (Words)high;
    a += 0x7fff + ((a >> 16) & 1);
    b += 0x7fff + ((b >> 16) & 1);
    return (a >> 16) | (b & 0xffff0000);
}

// `columns` columns of K of C panels, an even number of them.
template <typename Decoder, int C>
static inline __attribute__((always_inline)) void decode_panel(Decoder &decoder, int64_t columns, uint32_t *panel) {
    if (Decoder::STEP == 1) {
        for (int64_t k = 0; k < columns; k += 2) {
            Floats low[C];
            decoder.take(k);
#pragma GCC unroll 4
            for (int j = 0; j < C; ++j) low[j] = decoder.value(j, 0);
            decoder.take(k + 1);
#pragma GCC unroll 4
            for (int j = 0; j < C; ++j) store(panel + (k / 2 * C + j) * 16, pair_of(low[j], decoder.value(j, 0)));
        }
        return;
    }
    for (int64_t step = 0; step < columns / Decoder::STEP; ++step) {
        decoder.take(step);
        for (int column = 0; column < Decoder::STEP; column += 2) {
#pragma GCC unroll 4
            for (int j = 0; j < C; ++j) {
                Words pair = pair_of(decoder.value(j, column), decoder.value(j, column + 1));
                store(panel + ((step * Decoder::STEP + column) / 2 * C + j) * 16, pair);
            }
        }
    }
}

// sum[i][j] += column j of the panel times row i over `pairs` pairs of columns.
template <int R, int C>
static inline __attribute__((always_inline)) void add_panel(Floats (&sum)[R][C], const uint32_t *left, int64_t width,
                                                            const uint32_t *panel, int64_t pairs) {
    for (int64_t k = 0; k < pairs; ++k) {
        Words w[C];
#pragma GCC unroll 4
        for (int j = 0; j < C; ++j) w[j] = load<Words>(panel + (k * C + j) * 16);
#pragma GCC unroll 8
        for (int i = 0; i < R; ++i) {
            uint32_t x = left[i * width + k];
#pragma GCC unroll 4
            for (int j = 0; j < C; ++j) {
#if defined(__AVX512BF16__)
                __m512bh each_x = (__m512bh)_mm512_set1_epi32((int32_t)x);
                sum[i][j] = (Floats)_mm512_dpbf16_ps((__m512)sum[i][j], (__m512bh)w[j], each_x);
#else
                sum[i][j] = fused((Floats)(w[j] << 16), each(row::float_of(x << 16)), sum[i][j]);
                sum[i][j] = fused((Floats)(w[j] & 0xffff0000), each(row::float_of(x & 0xffff0000)), sum[i][j]);
#endif
            }
        }
    }
}

// Rows of bfloat16, `width` words apart; columns from `columns` on are 0, up to `stored`.
static inline void copy_rows(const bf16_t *from, int64_t rows, int64_t columns, int64_t stored, int64_t width,
                             uint32_t *to) {
    for (int64_t i = 0; i < rows; ++i) {
        char *out = (char *)(to + i * width);
        __builtin_memcpy(out, from + i * columns, columns * 2);
        __builtin_memset(out + columns * 2, 0, (stored - columns) * 2);
    }
}

}  // namespace gemm
