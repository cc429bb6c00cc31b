// Functions of one float32, written without branches so that loops over them become vector instructions.
//
//     exp       2^n e^r, n = round(x / ln 2), |r| <= ln 2 / 2 by a polynomial of degree 6        below 1.5 ulp
//     log       n ln 2 + log m, m in [2/3, 4/3) by a polynomial of degree 9                      below 1 ulp
//     erf       x P(x^2) up to 0.93, 1 - e^Q(|x|) beyond                                         below 1.5 ulp
//     sigmoid   1 / (1 + e^-x)                silu    x / (1 + e^-x)                             below 1.5e-7 max(1, |x|)
//     tanh      x + x^3 P(x^2) up to 0.55, 1 - 2 / (e^2|x| + 1) beyond                           below 2 ulp
//     gelu      max(x, 0) - |x| (1 - Phi(|x|)), Phi's tail as 2^P(|x|)                           below 1.5e-7 |x|
//     gelu_tanh    x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3))
//
// The polynomials of log and erf are those of N. Juffa (public domain, forums.developer.nvidia.com).
#include "base.h"

namespace row {

static inline __attribute__((always_inline)) float reciprocal_root(float x) { return 1.0f / __builtin_sqrtf(x); }

// e^r - 1 for |r| <= ln 2 / 2. Polynomials are summed in pairs: a chain of products waits for itself.
static inline __attribute__((always_inline)) float exp_near(float r) {
    float s = r * r;
    float high = fused(1.3813144760206342e-3f, s, fused(8.369418792426586e-3f, r, 4.166845604777336e-2f));
    float low = fused(1.6666515171527863e-1f, r, 4.999999403953552e-1f);
    return fused(fused(high, s, low), s, r);
}

// e^x; 0 below -103.98, infinite above 88.73. 2^n is two factors, so that results may be subnormal.
static inline __attribute__((always_inline)) float exp(float x) {
    float kept = minimum(maximum(x, -104.0f), 89.0f);
    float n = __builtin_rintf(kept * 1.4426950408889634f);
    float r = fused(n, -1.42860682030941723212e-6f, fused(n, -0.693145751953125f, kept));
    int32_t whole = (int32_t)n, half = whole >> 1;
    float made = (1.0f + exp_near(r)) * float_of((uint32_t)(half + 127) << 23);
    made = made * float_of((uint32_t)(whole - half + 127) << 23);
    return x == x ? made : x;
}

// e^x for what adds it to a number: 0 below -87, infinite above 88; one factor less.
static inline __attribute__((always_inline)) float exp_normal(float x) {
    float n = __builtin_rintf(x * 1.4426950408889634f);
    float r = fused(n, -1.42860682030941723212e-6f, fused(n, -0.693145751953125f, x));
    float made = float_of(bits_of(1.0f + exp_near(r)) + ((uint32_t)(int32_t)n << 23));
    made = x < -87.0f ? 0.0f : made;
    return x > 88.0f ? __builtin_inff() : made;
}

// ln x; -infinite at 0, no number below.
static inline __attribute__((always_inline)) float log(float x) {
    bool small = x < 1.17549435e-38f;
    float a = small ? x * 8388608.0f : x;
    int32_t e = (int32_t)((bits_of(a) - 0x3f2aaaabu) & 0xff800000u);
    float m = float_of(bits_of(a) - (uint32_t)e) - 1.0f;
    float i = fused((float)e, 1.19209290e-7f, small ? -23.0f : 0.0f);
    float s = m * m;
    float r = fused(-0.130310059f, s, -0.121483512f);
    float t = fused(0.140869141f, s, 0.139814854f);
    r = fused(r, s, -0.166846126f);
    t = fused(t, s, 0.200120345f);
    r = fused(r, s, -0.249996200f);
    r = fused(t, m, r);
    r = fused(r, m, 0.333331972f);
    r = fused(r, m, -0.5f);
    r = fused(r, s, m);
    r = fused(i, 0.693147182f, r);
    float odd = x == 0.0f ? -__builtin_inff() : x < 0.0f ? __builtin_nanf("") : x;
    return x > 0.0f && x < __builtin_inff() ? r : odd;
}

static inline __attribute__((always_inline)) float erf(float x) {
    float t = absolute(x), s = x * x;
    float r = fused(-1.72853470e-5f, t, 3.83197126e-4f);
    float u = fused(-3.88396438e-3f, t, 2.42546219e-2f);
    r = fused(r, s, u);
    r = fused(r, t, -1.06777877e-1f);
    r = fused(r, t, -6.34846687e-1f);
    r = fused(r, t, -1.28717512e-1f);
    r = fused(r, t, -t);
    float far = __builtin_copysignf(1.0f - exp_normal(t < 4.0f ? r : -80.0f), x);
    float p = fused(-5.96761703e-4f, s, 4.99119423e-3f);
    p = fused(p, s, -2.67681349e-2f);
    p = fused(p, s, 1.12819925e-1f);
    p = fused(p, s, -3.76125336e-1f);
    p = fused(p, s, 1.28379166e-1f);
    float near = fused(p, x, x);
    return t <= 0.927734375f ? near : x == x ? far : x;
}

static inline __attribute__((always_inline)) float sigmoid(float x) { return 1.0f / (1.0f + exp_normal(-x)); }

static inline __attribute__((always_inline)) float silu(float x) { return x / (1.0f + exp_normal(-x)); }

static inline __attribute__((always_inline)) float tanh(float x) {
    float t = absolute(x), s = x * x;
    float far = 1.0f - 2.0f / (exp_normal(2.0f * t) + 1.0f);
    float p = fused(-5.70498872745e-3f, s, 2.06390887954e-2f);
    p = fused(p, s, -5.37397155531e-2f);
    p = fused(p, s, 1.33314422036e-1f);
    p = fused(p, s, -3.33332819422e-1f);
    float near = fused(p * s, x, x);
    return t < 0.55f ? near : __builtin_copysignf(far, x);
}

// max(x, 0) - t 2^P(t), t = |x|, where 2^P(t) = (1 - erf(t / sqrt 2)) / 2 up to 4e-8: relative, so that nothing cancels
// where x is small. Beyond 6 the product is below 1e-8, and left out. The second polynomial is -2^r.
static inline __attribute__((always_inline)) float gelu(float x) {
    float t = absolute(x);
    float p = fused(8.470090506307315e-06f, t, -5.3903124353382736e-05f);
    p = fused(p, t, -0.0004212378116790205f);
    p = fused(p, t, 0.00738927535712719f);
    p = fused(p, t, -0.05269111320376396f);
    p = fused(p, t, -0.4591531455516815f);
    p = fused(p, t, -1.1511108875274658f);
    p = fused(p, t, -0.9999998807907104f);
    float n = __builtin_rintf(p), r = p - n;
    float q = fused(-1.327624311670661e-3f, r, -9.675770066678524e-3f);
    q = fused(q, r, -5.550715699791908e-2f);
    q = fused(q, r, -2.4022115767002106e-1f);
    q = fused(q, r, -6.931469440460205e-1f);
    q = fused(q, r, -1.0f);
    float tail = float_of(bits_of(q) + ((uint32_t)(int32_t)n << 23)), rest = 0.0f > x ? 0.0f : x;
    return t < 6.0f ? fused(t, tail, rest) : rest;
}

static inline __attribute__((always_inline)) float gelu_tanh(float x) {
    return x * sigmoid(1.5957691216057308f * (x + 0.044715f * x * x * x));
}

// ln(1 + e^x); ln(1 + e) as e ln(1 + e) / ((1 + e) - 1), which keeps its digits for a small e.
static inline __attribute__((always_inline)) float softplus(float x) {
    float e = exp(-absolute(x)), u = 1.0f + e;
    return maximum(x, 0.0f) + (u == 1.0f ? e : log(u) * e / (u == 1.0f ? 1.0f : u - 1.0f));
}

static inline __attribute__((always_inline)) float hard_sigmoid(float x, float alpha, float beta) {
    return minimum(1.0f, maximum(0.0f, alpha * x + beta));
}

static inline __attribute__((always_inline)) float hard_swish(float x) {
    return x * minimum(maximum(x / 6.0f + 0.5f, 0.0f), 1.0f);
}

static inline __attribute__((always_inline)) float leaky_relu(float x, float alpha) { return x >= 0.0f ? x : x * alpha; }

static inline __attribute__((always_inline)) float elu(float x, float alpha) {
    float less = x > -0.34f ? exp_near(maximum(x, -0.34f)) : exp_normal(x) - 1.0f;
    return x > 0.0f ? x : alpha * less;
}

}  // namespace row
