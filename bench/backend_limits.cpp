// What this machine can do at most: products from registers and fed from L2, and reading memory.
//
//     g++ -O3 -march=native -fopenmp backend_limits.cpp -o limits && ./limits THREADS
//
// One line of JSON: operations per second (a multiplication and an addition are two) and bytes per second, the best of
// several repetitions; null where the CPU lacks the instructions.
#include <immintrin.h>
#include <omp.h>
#include <unistd.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#ifdef __AMX_INT8__
#include <sys/syscall.h>
#endif

static double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// The best rate of `body(thread)`, which does `work` operations on each of `threads` threads.
template <typename Body>
static double best(int threads, double work, int repetitions, Body body) {
    double rate = 0;
#pragma omp parallel num_threads(threads)
    body(omp_get_thread_num());
    for (int i = 0; i < repetitions; ++i) {
        double begin = now();
#pragma omp parallel num_threads(threads)
        body(omp_get_thread_num());
        double found = work * threads / (now() - begin);
        rate = found > rate ? found : rate;
    }
    return rate;
}

static void* space(size_t bytes) {
    void* made = nullptr;
    if (posix_memalign(&made, 4096, bytes) != 0) std::abort();
    std::memset(made, 1, bytes);
    return made;
}

static void show(const char* name, double value) {
    if (value > 0)
        std::printf("\"%s\": %.6g, ", name, value);
    else
        std::printf("\"%s\": null, ", name);
}

static const int REPETITIONS = 200;  // short ones: on a machine that is shared some of them run undisturbed
static const size_t PANEL = 512 << 10;  // bytes that are fed from L2: more than L1, less than half of L2 at 1 MB
static const long K = 1024;             // bytes of a row of the left operand, which stays in L1

#ifdef __AVX512F__
// A thread's own operands, made before the first repetition that is timed.
static char* panels() {
    static thread_local char* made = static_cast<char*>(space(PANEL));
    return made;
}

static char* left_rows() {
    static thread_local char* made = static_cast<char*>(space(16 * K));
    return made;
}

#else
typedef float vector __attribute__((vector_size(64)));

static double fp32_plain(int threads) {
    const long steps = 200000;
    return best(threads, steps * 12 * 32.0, REPETITIONS, [=](int) {
        vector sum[12], x = {1.5f}, y = {0.5f};
        for (int j = 0; j < 12; ++j) sum[j] = vector{float(j)};
        for (long i = 0; i < steps; ++i) {
            asm volatile("" : "+m"(x), "+m"(y));
#pragma GCC unroll 12
            for (int j = 0; j < 12; ++j) sum[j] += x * y;
        }
        for (int j = 0; j < 12; ++j) asm volatile("" : : "m"(sum[j]));
    });
}
#endif

#ifdef __AVX512F__
// Zero, of which the compiler knows nothing: equal sums would be merged into one.
template <typename Accumulator>
static inline Accumulator unknown() {
    Accumulator made = {};
    asm volatile("" : "+v"(made));
    return made;
}

// Rows of 6 times panels of 4 vectors: 24 products for 4 loads of the panel (L2) and 6 broadcasts (L1).
template <typename Accumulator, typename Product>
static double fed(int threads, double operations, Product product) {
    const long rounds = 40;
    const long steps = PANEL / 256;
    return best(threads, rounds * steps * 24 * operations, REPETITIONS, [=](int) {
        char *panel = panels(), *rows = left_rows();
        Accumulator sum[6][4];
#pragma GCC unroll 6
        for (int r = 0; r < 6; ++r)
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) sum[r][j] = unknown<Accumulator>();
        for (long round = 0; round < rounds; ++round)
            for (long i = 0; i < steps; ++i) {
                const char* at = panel + i * 256;
                const char* left = rows + (i * 4) % K;
                __m512i b[4];
#pragma GCC unroll 4
                for (int j = 0; j < 4; ++j) b[j] = _mm512_load_si512(at + 64 * j);
#pragma GCC unroll 6
                for (int r = 0; r < 6; ++r) {
                    int word;
                    std::memcpy(&word, left + r * K, 4);
                    __m512i a = _mm512_set1_epi32(word);
#pragma GCC unroll 4
                    for (int j = 0; j < 4; ++j) sum[r][j] = product(sum[r][j], a, b[j]);
                }
            }
#pragma GCC unroll 6
        for (int r = 0; r < 6; ++r)
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) asm volatile("" : : "v"(sum[r][j]));
    });
}

template <typename Accumulator, typename Product>
static double registers(int threads, double operations, Product product) {
    const long steps = 200000;
    return best(threads, steps * 16 * operations, REPETITIONS, [=](int) {
        Accumulator sum[16];
#pragma GCC unroll 16
        for (int j = 0; j < 16; ++j) sum[j] = unknown<Accumulator>();
        __m512i a = _mm512_set1_epi8(1), b = _mm512_set1_epi8(1);
        for (long i = 0; i < steps; ++i) {
            asm volatile("" : "+v"(a), "+v"(b));
#pragma GCC unroll 16
            for (int j = 0; j < 16; ++j) sum[j] = product(sum[j], a, b);
        }
#pragma GCC unroll 16
        for (int j = 0; j < 16; ++j) asm volatile("" : : "v"(sum[j]));
    });
}

static const auto fp32 = [](__m512 s, __m512i a, __m512i b) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), s);
};
#endif
#ifdef __AVX512VNNI__
static const auto int8 = [](__m512i s, __m512i a, __m512i b) { return _mm512_dpbusd_epi32(s, a, b); };
#endif
#ifdef __AVX512BF16__
static const auto bf16 = [](__m512 s, __m512i a, __m512i b) {
    return _mm512_dpbf16_ps(s, (__m512bh)a, (__m512bh)b);
};
#endif

#if defined(__AMX_INT8__) && defined(__AMX_BF16__)
struct alignas(64) TileConfig {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t columns[16] = {};
    uint8_t rows[16] = {};
    TileConfig() {
        for (int i = 0; i < 8; ++i) columns[i] = 64, rows[i] = 16;
    }
};

static bool amx_allowed() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }  // ARCH_REQ_XCOMP_PERM, XTILEDATA

// Four products of tiles of 16 x 64 bytes for each step; fed: two tiles of each side are loaded for them, the right
// ones from L2.
template <bool INT8, bool FED>
static double amx(int threads) {
    const long steps = 20000;
    const double operations = 16.0 * 16 * (INT8 ? 64 : 32) * 2;
    return best(threads, steps * 4 * operations, REPETITIONS, [=](int) {
        TileConfig config;
        _tile_loadconfig(&config);
        char *panel = panels(), *rows = left_rows();
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        _tile_loadd(4, rows, 64);
        _tile_loadd(5, rows + 1024, 64);
        _tile_loadd(6, panel, 64);
        _tile_loadd(7, panel + 1024, 64);
        for (long i = 0; i < steps; ++i) {
            if (FED) {
                const char* right = panel + (i * 2048) % PANEL;
                const char* left = rows + (i % 8) * 2048;
                _tile_loadd(4, left, 64);
                _tile_loadd(5, left + 1024, 64);
                _tile_loadd(6, right, 64);
                _tile_loadd(7, right + 1024, 64);
            }
            if (INT8) {
                _tile_dpbusd(0, 4, 6);
                _tile_dpbusd(1, 4, 7);
                _tile_dpbusd(2, 5, 6);
                _tile_dpbusd(3, 5, 7);
            } else {
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(1, 4, 7);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
        _tile_release();
    });
}
#endif

// Bytes read per second from far more memory than the caches hold; each thread reads a part of its own, a slice of it
// at a time.
static double memory(int threads) {
    const size_t bytes = size_t(256) << 20, slice = bytes / 16;
    char* data = static_cast<char*>(space(bytes * threads));
    long turns[256] = {};
    double rate = best(threads, double(slice), 64, [=, &turns](int thread) {
        typedef long long words __attribute__((vector_size(64)));
        size_t begin = bytes * thread + slice * (turns[thread]++ % 16);
        const words* at = reinterpret_cast<const words*>(data + begin);
        words sum[8] = {};
        for (size_t i = 0; i < slice / 64; i += 8)
            for (int j = 0; j < 8; ++j) sum[j] ^= at[i + j];
        for (int j = 0; j < 8; ++j) asm volatile("" : : "m"(sum[j]));
    });
    std::free(data);
    return rate;
}

int main(int count, char** values) {
    int threads = count > 1 ? std::atoi(values[1]) : 1;
    double none = 0;
    double vnni = none, vnni_fed = none, bf = none, bf_fed = none, fp_fed = none;
    double fp = none, amx8 = none, amx8_fed = none, amx16 = none, amx16_fed = none;
#ifdef __AVX512F__
    fp = registers<__m512>(threads, 32, fp32);
    fp_fed = fed<__m512>(threads, 32, fp32);
#else
    fp = fp32_plain(threads);
#endif
#ifdef __AVX512VNNI__
    vnni = registers<__m512i>(threads, 128, int8);
    vnni_fed = fed<__m512i>(threads, 128, int8);
#endif
#ifdef __AVX512BF16__
    bf = registers<__m512>(threads, 64, bf16);
    bf_fed = fed<__m512>(threads, 64, bf16);
#endif
#if defined(__AMX_INT8__) && defined(__AMX_BF16__)
    if (amx_allowed()) {
        amx8 = amx<true, false>(threads);
        amx8_fed = amx<true, true>(threads);
        amx16 = amx<false, false>(threads);
        amx16_fed = amx<false, true>(threads);
    }
#endif
    std::printf("{");
    show("vnni_int8_registers", vnni);
    show("vnni_int8_l2", vnni_fed);
    show("avx512_bf16_registers", bf);
    show("avx512_bf16_l2", bf_fed);
    show("amx_int8_registers", amx8);
    show("amx_int8_l2", amx8_fed);
    show("amx_bf16_registers", amx16);
    show("amx_bf16_l2", amx16_fed);
    show("fp32_registers", fp);
    show("fp32_l2", fp_fed);
    std::printf("\"memory\": %.6g}\n", memory(threads));
}
