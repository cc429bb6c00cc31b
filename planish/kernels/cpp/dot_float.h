// Sums of products of floats: rows of float32 times panels of a weight that is decoded in registers.
//
// A decoder has STEP, the columns that it holds at a time, `take`, which loads those of C panels, and `value`, a column of
// a panel as float32. `weight` points at the first step, BYTES of each panel a step; its zero points are those of unsigned
// codes.
#include <cstdint>

namespace gemm {

template <typename T, int C>
static inline __attribute__((always_inline)) void load_each(Floats (&held)[C], const T *from) {
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) held[j] = wide16(from + j * 16);
}

// Codes of 4 or 2 bits: [N / 64][K / STEP][4 panels][16 columns] words, column p of a step in the bits from BITS p on.
template <int BITS, bool ZERO, int C>
struct Codes {
    static constexpr int STEP = 32 / BITS, BYTES = 64;
    const uint8_t *weight;
    Words held[C];
    Floats zero[C];

    inline __attribute__((always_inline)) void take(int64_t step) {
#pragma GCC unroll 4
        for (int j = 0; j < C; ++j) held[j] = load<Words>(weight + step * 256 + j * 64);
    }

    inline __attribute__((always_inline)) Floats value(int j, int column) const {
        Floats code = ZERO ? codes<BITS, 0>(held[j], BITS * column) : codes<BITS, 1>(held[j], BITS * column);
        return ZERO ? code - zero[j] : code;
    }
};

// 8-bit codes and floats: [N / 64][K][4 panels][16 columns].
template <typename T, bool ZERO, int C>
struct Numbers {
    static constexpr int STEP = 1, BYTES = 16 * sizeof(T);
    const uint8_t *weight;
    Floats held[C], zero[C];

    inline __attribute__((always_inline)) void take(int64_t step) {
#pragma GCC unroll 4
        for (int j = 0; j < C; ++j) held[j] = wide16((const T *)weight + step * 64 + j * 16);
    }

    inline __attribute__((always_inline)) Floats value(int j, int) const { return ZERO ? held[j] - zero[j] : held[j]; }
};

// Codes of clusters, (code - zero[id]) scale[id]: codes as in `Codes`, ids [N / 64][K / STEP][4 panels][16 columns].
template <int BITS, int CLUSTERS, typename Id, bool ZERO, int C>
struct Split {
    static constexpr int STEP = 32 / BITS, BYTES = 64, ID_BITS = CLUSTERS <= 2 ? 1 : 2;
    const uint8_t *weight;
    const Id *ids;
    Words held[C], id[C];
    Floats scale[CLUSTERS][C], zero[CLUSTERS][C];

    inline __attribute__((always_inline)) void take(int64_t step) {
#pragma GCC unroll 4
        for (int j = 0; j < C; ++j) {
            held[j] = load<Words>(weight + step * 256 + j * 64);
            id[j] = words16(ids + step * 64 + j * 16);
        }
    }

    inline __attribute__((always_inline)) Floats chosen(const Floats (&of)[CLUSTERS][C], int j, int column) const {
        int place = ID_BITS * column;
        Floats low = choose(id[j], place, of[0][j], of[1][j]);
        if (CLUSTERS == 2) return low;
        Floats high = CLUSTERS == 3 ? of[2][j] : choose(id[j], place, of[2][j], of[CLUSTERS - 1][j]);
        return choose(id[j], place + 1, low, high);
    }

    inline __attribute__((always_inline)) Floats value(int j, int column) const {
        Floats code = ZERO ? codes<BITS, 0>(held[j], BITS * column) : codes<BITS, 1>(held[j], BITS * column);
        return (ZERO ? code - chosen(zero, j, column) : code) * chosen(scale, j, column);
    }
};

// sum[i][j] += weight of panel j times row i over `steps` steps of the decoder.
template <typename Decoder, int R, int C>
static inline __attribute__((always_inline)) void add_floats(Floats (&sum)[R][C], const float *left, int64_t width,
                                                             int64_t steps, Decoder &decoder) {
    constexpr int CHAINS = R <= 2 && Decoder::STEP > 1 ? 2 : 1;  // few sums would wait for each other
    Floats more[CHAINS == 2 ? R : 1][CHAINS == 2 ? C : 1];
    clear(more);
    for (int64_t step = 0; step < steps; ++step) {
        soon<R, Decoder::BYTES * C>(decoder.weight + step * Decoder::BYTES * 4);
        decoder.take(step);
#pragma GCC unroll 16
        for (int column = 0; column < Decoder::STEP; ++column) {
            Floats w[C];
#pragma GCC unroll 4
            for (int j = 0; j < C; ++j) w[j] = decoder.value(j, column);
#pragma GCC unroll 8
            for (int i = 0; i < R; ++i) {
                Floats x = each(left[i * width + step * Decoder::STEP + column]);
#pragma GCC unroll 4
                for (int j = 0; j < C; ++j) {
                    Floats &to = CHAINS == 2 && column % 2 ? more[i][j] : sum[i][j];
                    to = fused(w[j], x, to);
                }
            }
        }
    }
    add_chains<CHAINS>(sum, more);
}

// Rows of floats or bytes as float32, `width` apart; columns from `columns` on are 0.
template <typename T>
static void widen_rows(const T *from, int64_t rows, int64_t step, int64_t columns, int64_t width, float *to) {
    for (int64_t i = 0; i < rows; ++i) {
        for (int64_t k = 0; k < columns; ++k) to[i * width + k] = row::wide(from[i * step + k]);
        for (int64_t k = columns; k < width; ++k) to[i * width + k] = 0.0f;
    }
}

// Rows times the scales of their groups of columns.
static void scale_groups(float *rows, int64_t count, int64_t columns, int64_t width, int64_t group, const float *scale) {
    int64_t groups = (columns + group - 1) / group;
    for (int64_t i = 0; i < count; ++i) {
        for (int64_t k = 0; k < columns; ++k) rows[i * width + k] *= scale[i * groups + k / group];
    }
}

}  // namespace gemm
