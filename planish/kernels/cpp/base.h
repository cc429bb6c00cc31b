// Floats of 16 bits as they lie in memory, scratch memory of a thread, and the few words that all rows use.
//
// Arithmetic is float32 throughout. A conversion to bf16 or f16 rounds to nearest, ties to even, as torch does.
// Multiplications and additions are not contracted (-ffp-contract=off): `fused` says where they are one operation.
#include <cstdint>
#include <cstring>

struct bf16_t {
    uint16_t bits;
};

struct f16_t {
    uint16_t bits;
};

namespace row {

static inline __attribute__((always_inline)) float float_of(uint32_t bits) {
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
}

static inline __attribute__((always_inline)) uint32_t bits_of(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    return bits;
}

// a b + c with one rounding where the machine can; of two roundings elsewhere.
static inline __attribute__((always_inline)) float fused(float a, float b, float c) {
#ifdef __FP_FAST_FMAF
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

static inline __attribute__((always_inline)) float absolute(float x) { return __builtin_fabsf(x); }

// The larger one; b where either is no number.
static inline __attribute__((always_inline)) float maximum(float a, float b) { return a > b ? a : b; }

// The smaller one; b where either is no number.
static inline __attribute__((always_inline)) float minimum(float a, float b) { return a < b ? a : b; }

// The larger and the smaller one; no number where either is none.
static inline __attribute__((always_inline)) float largest(float a, float b) { return a != a ? a : maximum(a, b); }

static inline __attribute__((always_inline)) float least(float a, float b) { return a != a ? a : minimum(a, b); }

// Sizes of numbers as integers, which grow with them; what is no number is larger than all. Extremes of a row that a
// scale follows from are taken in this form: of floats an instruction forgets what is no number.
static inline __attribute__((always_inline)) int32_t order(float x) { return (int32_t)(bits_of(x) & 0x7fffffff); }

static inline __attribute__((always_inline)) int32_t larger(int32_t a, int32_t b) { return a > b ? a : b; }

// The part of a number above and below 0; what is no number stays none.
static inline __attribute__((always_inline)) float above(float x) { return x < 0.0f ? 0.0f : x; }

static inline __attribute__((always_inline)) float below(float x) { return x > 0.0f ? 0.0f : x; }

static inline __attribute__((always_inline)) float size_of(int32_t order) { return float_of((uint32_t)order); }

static inline __attribute__((always_inline)) float wide(float x) { return x; }

static inline __attribute__((always_inline)) float wide(int8_t x) { return (float)x; }

static inline __attribute__((always_inline)) float wide(bf16_t x) { return float_of((uint32_t)x.bits << 16); }

// The exponent moves by a product: 2^112 makes subnormal numbers normal; infinities and no-numbers get theirs back.
static inline __attribute__((always_inline)) float wide(f16_t x) {
    uint32_t held = (uint32_t)(x.bits & 0x7fff) << 13;
    float value = float_of(held) * 0x1p112f;
    uint32_t bits = held >= 0x0f800000 ? held | 0x7f800000 : bits_of(value);
    return float_of(bits | (uint32_t)(x.bits & 0x8000) << 16);
}

template <typename T>
T narrow(float x);

template <>
inline __attribute__((always_inline)) float narrow<float>(float x) {
    return x;
}

template <>
inline __attribute__((always_inline)) bf16_t narrow<bf16_t>(float x) {
    uint32_t bits = bits_of(x);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return bf16_t{(uint16_t)(x == x ? rounded : 0x7fc0)};
}

// Numbers below 2^-14 are rounded by the sum with 1/2, whose last place is f16's least number; others by the carry.
template <>
inline __attribute__((always_inline)) f16_t narrow<f16_t>(float x) {
    uint32_t bits = bits_of(x), sign = bits & 0x80000000, size = bits ^ sign;
    uint32_t small = bits_of(float_of(size) + 0.5f) - 0x3f000000;
    uint32_t usual = (size + 0xc8000fff + ((size >> 13) & 1)) >> 13;
    uint32_t large = size > 0x7f800000 ? 0x7e00 : 0x7c00;
    uint32_t made = size >= 0x47800000 ? large : size < 0x38800000 ? small : usual;
    return f16_t{(uint16_t)(made | sign >> 16)};
}

// Memory of a thread, 64 bytes aligned; kept between calls, freed with the thread.
static inline float *scratch(int64_t floats) {
    struct Held {
        float *memory = nullptr;
        int64_t size = 0;
        ~Held() { __builtin_free(memory); }
    };
    static thread_local Held held;
    if (held.size < floats) {
        __builtin_free(held.memory);
        int64_t bytes = (floats * 4 + 63) / 64 * 64;
        held.memory = (float *)__builtin_aligned_alloc(64, bytes);
        held.size = held.memory ? floats : 0;
        if (!held.memory) __builtin_abort();
    }
    return held.memory;
}

}  // namespace row
