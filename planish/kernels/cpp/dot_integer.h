// Sums of products of integers: rows of signed bytes times panels of unsigned codes of 8, 4 or 2 bits.
//
// Packed weight, blocks of 64 columns: [N / 64][K / (32 / BITS)][4 panels][16 columns][4 bytes]. Byte b of a lane holds
// 8 / BITS codes: column 4 p + b of the unit in its bits from BITS p on. The codes are unsigned, signed ones plus the
// middle m of their range: sum (w + m) a = sum w a + m sum a, and `row_sums` takes the second term back.
#include <cstdint>
#include <cstring>

namespace gemm {

// Memory that many rows ask for while they are multiplied: `step` bytes further on after each unit.
struct Ahead {
    const uint8_t *at;
    int64_t step;
};

// The block of a weight behind that of a tile, of which each tile of rows asks for its share, while its first panels are
// multiplied: a block is read from the third cache or from memory once for all rows. `weight`: as for `add_products`.
template <int R>
static inline __attribute__((always_inline)) Ahead ahead_of(const uint8_t *weight, int64_t panel, int64_t block_units,
                                                            int64_t units, int64_t row, int64_t rows) {
    int64_t step = panel == 0 ? 256 * R / rows : 0;
    return {weight + (block_units * 4 - panel) * 64 + row / R * units * step, step};
}

// sum[i][j] += weight of panel j times row i over `units` units of 32 / BITS columns each.
template <int BITS, int R, int C>
static inline __attribute__((always_inline)) void add_products(Ints (&sum)[R][C], const int8_t *left, int64_t step,
                                                               const uint8_t *weight, int64_t units, Ahead ahead) {
    constexpr int PARTS = 8 / BITS;
    constexpr uint32_t MASK = BITS == 8 ? 0xffffffff : BITS == 4 ? 0x0f0f0f0f : 0x03030303;
    for (int64_t unit = 0; unit < units; ++unit) {
        soon<R, 64 * C>(weight + unit * 256);
        if (R > 4) __builtin_prefetch(ahead.at + unit * ahead.step);
        Words held[C];
#pragma GCC unroll 4
        for (int j = 0; j < C; ++j) held[j] = load<Words>(weight + unit * 256 + j * 64);
#pragma GCC unroll 4
        for (int part = 0; part < PARTS; ++part) {
            Words w[C];
#pragma GCC unroll 4
            for (int j = 0; j < C; ++j) w[j] = BITS == 8 ? held[j] : (held[j] >> (BITS * part)) & MASK;
#pragma GCC unroll 8
            for (int i = 0; i < R; ++i) {
                int32_t x = load<int32_t>(left + i * step + (unit * PARTS + part) * 4);
#pragma GCC unroll 4
                for (int j = 0; j < C; ++j) sum[i][j] = dot4(sum[i][j], w[j], x);
            }
        }
    }
}

// Sums of each `unit` columns of rows of `columns` bytes: [rows][groups]. Columns beyond the groups are 0.
static void row_sums(const int8_t *left, int64_t rows, int64_t columns, int64_t unit, int64_t groups, int32_t *sums) {
    for (int64_t i = 0; i < rows; ++i) {
        for (int64_t group = 0; group < groups; ++group) {
            int64_t first = group * unit, last = first + unit < columns ? first + unit : columns;
            int32_t sum = 0;
            if ((last - first) % 64 == 0) {
                Ints lanes{};
                for (int64_t k = first; k < last; k += 64) lanes = bytes4(lanes, load<Ints>(left + i * columns + k));
                sum = total(lanes);
            } else {
                for (int64_t k = first; k < last; ++k) sum += left[i * columns + k];
            }
            sums[i * groups + group] = sum;
        }
    }
}

// Rows of 4-bit codes, two a byte, by halves of a span of 64 columns, as bytes.
template <bool SIGNED>
static void unpack_rows(const int8_t *packed, int64_t rows, int64_t columns, int8_t *left) {
    for (int64_t span = 0; span < rows * columns / 64; ++span) {
        for (int k = 0; k < 32; ++k) {
            uint8_t held = (uint8_t)packed[span * 32 + k];
            left[span * 64 + k] = (int8_t)(SIGNED ? ((held & 15) ^ 8) - 8 : held & 15);
            left[span * 64 + 32 + k] = (int8_t)(SIGNED ? ((held >> 4) ^ 8) - 8 : held >> 4);
        }
    }
}

}  // namespace gemm
