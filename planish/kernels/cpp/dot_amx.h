// Sums of products of 32 rows and 32 columns at once in the tile registers of AMX, which hold 16 rows of 64 bytes each.
//
// The results are those of `add_products` (dot_integer.h) and `add_panel` (dot_panel.h), from the same memory. What
// multiplies is chosen where the file is compiled: AMX, or, to test the same loops on any machine, loops of its meaning
// (EMULATE_TILES). Linux hands the tile registers out on request; where it does not, or where a product that is known
// comes out wrong, `tiles_ready` is false and other instructions take the rows.
#include <cstdint>
#include <cstring>
#if defined(__AMX_INT8__) && defined(__AMX_BF16__) && defined(__linux__) && !defined(EMULATE_TILES)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#define TILES_OF_AMX
#endif
#if defined(TILES_OF_AMX) || defined(EMULATE_TILES)
#define HAS_TILES
#endif

namespace gemm {

constexpr int TILE_ROWS = 32;  // 2 x 2 tiles of sums

#if defined(TILES_OF_AMX)
struct TileSizes {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// The tile registers of a thread, for as long as this lives.
struct TileUse {
    bool held;
    explicit TileUse(bool wanted) : held(wanted) {
        TileSizes sizes;
        if (held) _tile_loadconfig(&sizes);
    }
    ~TileUse() {
        if (held) _tile_release();
    }
    TileUse(const TileUse &) = delete;
};

#define TILE_CLEAR(t) _tile_zero(t)
#define TILE_LOAD(t, at, step) _tile_loadd(t, at, step)
#define TILE_STORE(t, at, step) _tile_stored(t, at, step)
#define TILE_BYTES(t, a, w) _tile_dpbsud(t, a, w)
#define TILE_PAIRS(t, a, w) _tile_dpbf16ps(t, a, w)
#elif defined(EMULATE_TILES)
struct TileUse {
    static inline thread_local uint32_t tile[8][16][16];
    static inline thread_local bool configured = false;
    bool held;
    explicit TileUse(bool wanted) : held(wanted) { configured = wanted; }
    ~TileUse() { configured = false; }
    TileUse(const TileUse &) = delete;

    static void clear(int t) { memset(tile[t], configured ? 0 : 0x55, sizeof tile[t]); }
    static void load(int t, const void *at, int64_t step) {
        for (int i = 0; i < 16; ++i) memcpy(tile[t][i], (const char *)at + i * step, 64);
    }
    static void store(int t, void *at, int64_t step) {
        for (int i = 0; i < 16; ++i) memcpy((char *)at + i * step, tile[t][i], 64);
    }
    static void bytes(int t, int a, int w) {
        for (int i = 0; i < 16; ++i)
            for (int j = 0; j < 16; ++j)
                for (int k = 0; k < 64; ++k)
                    tile[t][i][j] += (uint32_t)((int8_t)(tile[a][i][k / 4] >> k % 4 * 8) *
                                                (int32_t)(uint8_t)(tile[w][k / 4][j] >> k % 4 * 8));
    }
    static float part(uint32_t word, int high) {
        return row::float_of(high ? word & 0xffff0000 : word << 16);
    }
    static void pairs(int t, int a, int w) {
        for (int i = 0; i < 16; ++i)
            for (int j = 0; j < 16; ++j) {
                float sum = row::float_of(tile[t][i][j]);
                for (int k = 0; k < 32; ++k) sum += part(tile[a][i][k / 2], k % 2) * part(tile[w][k / 2][j], k % 2);
                tile[t][i][j] = row::bits_of(sum);
            }
    }
};

#define TILE_CLEAR(t) TileUse::clear(t)
#define TILE_LOAD(t, at, step) TileUse::load(t, at, step)
#define TILE_STORE(t, at, step) TileUse::store(t, at, step)
#define TILE_BYTES(t, a, w) TileUse::bytes(t, a, w)
#define TILE_PAIRS(t, a, w) TileUse::pairs(t, a, w)
#endif

#ifdef HAS_TILES

// The four tiles of sums, 0 to 3, to sums of 32 rows and 2 vectors.
template <typename T>
static inline __attribute__((always_inline)) void store_tiles(T (&sum)[TILE_ROWS][2]) {
    TILE_STORE(0, &sum[0][0], 128);
    TILE_STORE(1, &sum[0][1], 128);
    TILE_STORE(2, &sum[16][0], 128);
    TILE_STORE(3, &sum[16][1], 128);
}

static inline __attribute__((always_inline)) void clear_tiles() {
    TILE_CLEAR(0);
    TILE_CLEAR(1);
    TILE_CLEAR(2);
    TILE_CLEAR(3);
}

// 64 columns of two panels of codes as bytes, [2][16][16][4], from units of 32 / BITS columns.
template <int BITS>
static inline __attribute__((always_inline)) void spread(const uint8_t *weight, uint8_t *bytes) {
    constexpr int PARTS = 8 / BITS;
    constexpr uint32_t MASK = BITS == 4 ? 0x0f0f0f0f : 0x03030303;
    for (int unit = 0; unit < 16 / PARTS; ++unit) {
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
            Words held = load<Words>(weight + unit * 256 + j * 64);
#pragma GCC unroll 4
            for (int part = 0; part < PARTS; ++part)
                store(bytes + j * 1024 + (unit * PARTS + part) * 64, (held >> (BITS * part)) & MASK);
        }
    }
}

// sum = what `add_products` adds to nothing, for units that make up whole 64 columns.
template <int BITS>
static inline __attribute__((always_inline)) void tile_products(Ints (&sum)[TILE_ROWS][2], const int8_t *left,
                                                                int64_t step, const uint8_t *weight, int64_t units) {
    constexpr int EACH = 2 * BITS;  // units of 64 columns
    alignas(64) uint8_t bytes[BITS == 8 ? 1 : 2048];
    clear_tiles();
    for (int64_t unit = 0; unit < units; unit += EACH, left += 64) {
        const uint8_t *at = weight + unit * 256;
        TILE_LOAD(4, left, step);
        TILE_LOAD(5, left + 16 * step, step);
        if constexpr (BITS == 8) {
            TILE_LOAD(6, at, 256);
            TILE_LOAD(7, at + 64, 256);
        } else {
            spread<BITS>(at, bytes);
            TILE_LOAD(6, bytes, 64);
            TILE_LOAD(7, bytes + 1024, 64);
        }
        TILE_BYTES(0, 4, 6);
        TILE_BYTES(1, 4, 7);
        TILE_BYTES(2, 5, 6);
        TILE_BYTES(3, 5, 7);
    }
    store_tiles(sum);
}

// sum = what `add_panel` adds to nothing, for a multiple of 16 pairs.
static inline __attribute__((always_inline)) void tile_pairs(Floats (&sum)[TILE_ROWS][2], const uint32_t *left,
                                                             int64_t step, const uint32_t *panel, int64_t count) {
    clear_tiles();
    for (int64_t pair = 0; pair < count; pair += 16, left += 16, panel += 512) {
        TILE_LOAD(4, left, step * 4);
        TILE_LOAD(5, left + 16 * step, step * 4);
        TILE_LOAD(6, panel, 128);
        TILE_LOAD(7, panel + 16, 128);
        TILE_PAIRS(0, 4, 6);
        TILE_PAIRS(1, 4, 7);
        TILE_PAIRS(2, 5, 6);
        TILE_PAIRS(3, 5, 7);
    }
    store_tiles(sum);
}

// Two products whose results are known, once in a process.
static __attribute__((noinline)) bool tiles_right() {
    TileUse use(true);
    alignas(64) int8_t rows[TILE_ROWS][64];
    alignas(64) uint8_t codes[16][256];
    alignas(64) uint32_t pairs[TILE_ROWS][16], panel[16][32];
    for (int i = 0; i < TILE_ROWS; ++i)
        for (int k = 0; k < 64; ++k) rows[i][k] = (int8_t)((i * 37 + k * 11) % 255 - 127);
    for (int k = 0; k < 16; ++k)
        for (int j = 0; j < 256; ++j) codes[k][j] = (uint8_t)(k * 29 + j * 7);
    auto half = [](int x) { return row::bits_of((float)x) >> 16; };  // small whole numbers are exact
    for (int i = 0; i < TILE_ROWS; ++i)
        for (int k = 0; k < 16; ++k) pairs[i][k] = half((i + k) % 9 - 4) | half((i * 3 + k) % 7 - 3) << 16;
    for (int k = 0; k < 16; ++k)
        for (int j = 0; j < 32; ++j) panel[k][j] = half((j + k * 5) % 11 - 5) | half((j * 2 + k) % 5 - 2) << 16;
    Ints whole[TILE_ROWS][2];
    Floats real[TILE_ROWS][2];
    tile_products<8>(whole, &rows[0][0], 64, &codes[0][0], 16);
    tile_pairs(real, &pairs[0][0], 16, &panel[0][0], 16);
    for (int i = 0; i < TILE_ROWS; ++i)
        for (int j = 0; j < 32; ++j) {
            int32_t sum = 0;
            float other = 0.0f;
            for (int k = 0; k < 64; ++k) sum += rows[i][k] * codes[k / 4][j * 4 + k % 4];
            for (int k = 0; k < 16; ++k)
                other += row::float_of(pairs[i][k] << 16) * row::float_of(panel[k][j] << 16) +
                         row::float_of(pairs[i][k] & 0xffff0000) * row::float_of(panel[k][j] & 0xffff0000);
            if (whole[i][j / 16][j % 16] != sum || real[i][j / 16][j % 16] != other) return false;
        }
    return true;
}

// Whether the tile registers may be used.
static bool tiles_ready() {
#if defined(TILES_OF_AMX)
    constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    static const bool ready = syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0 && tiles_right();
#else
    static const bool ready = tiles_right();
#endif
    return ready;
}
#else
template <int BITS, typename... Given>
static inline void tile_products(Given &&...) {}

template <typename... Given>
static inline void tile_pairs(Given &&...) {}
#endif

}  // namespace gemm
