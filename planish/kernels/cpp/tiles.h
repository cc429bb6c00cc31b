// The tiles of a block of rows and columns of a product.
#include <cstdint>
#include <type_traits>

namespace gemm {

template <int SIZE>
using Size = std::integral_constant<int, SIZE>;

// Sums of a tile stay in registers: of 32 with 16 lanes, or of 16 with 8.
#if defined(__AVX512F__)
constexpr int TALL = 8, NARROW = 2, WIDE = 4;
#else
constexpr int TALL = 4, NARROW = 1, WIDE = 2;
#endif

// Call f(Size<R>, Size<C>, row, column) for tiles of R rows and C panels of 16 columns that cover all rows and the
// columns from `begin` to `end`, multiples of 64. The last tile of rows begins early rather than being small: what two
// tiles cover is computed twice. Few rows take many columns at once, so that a weight is streamed through.
template <int R, int C, typename F>
static inline __attribute__((always_inline)) void tiles_of(int64_t rows, int64_t begin, int64_t end, const F &f) {
    for (int64_t column = begin; column < end; column += C * 16) {
        for (int64_t row = 0; row < rows; row += R) f(Size<R>(), Size<C>(), row < rows - R ? row : rows - R, column);
    }
}

template <typename F>
static inline __attribute__((always_inline)) void tiles(int64_t rows, int64_t begin, int64_t end, const F &f) {
    if (rows >= TALL) {
        tiles_of<TALL, NARROW>(rows, begin, end, f);
#if defined(__AVX512F__)
    } else if (rows >= 4) {
        tiles_of<4, WIDE>(rows, begin, end, f);
#endif
    } else if (rows >= 2) {
        tiles_of<2, WIDE>(rows, begin, end, f);
    } else {
        tiles_of<1, WIDE>(rows, begin, end, f);
    }
}

// Rows of a block, a multiple of 8: at most `most`, and as many blocks as threads can share evenly.
static inline int64_t block_rows(int64_t rows, int64_t most, int64_t threads) {
    int64_t blocks = (rows + most - 1) / most;
    blocks = (blocks + threads - 1) / threads * threads;
    int64_t each = (rows + blocks - 1) / blocks;
    return (each + 7) / 8 * 8;
}

}  // namespace gemm
