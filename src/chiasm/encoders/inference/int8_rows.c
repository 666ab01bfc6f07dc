/* What stands around the products of int8 rows (int8.py): float32 rows to int8 with a scale each, and back.
 *
 * In: rows (n, width) of float32 without gaps. Out, row by row: y = y * scale + bias and an activation, in place; and, where
 * asked for, the row as int8 in -127..127 with its own scale, so that what follows never sees float32. A row that holds
 * something that is no finite number gets the scale NaN, so that it stays visible. Every row is worked out alone.
 *
 * Built as an optional extension and called through ctypes; without it torch does the same in more passes. Loops are
 * written so that compilers turn them into vector code: maxima as integers (the bits of a positive float32 are in the
 * order of its value), rounding by adding 1.5 * 2^23.
 */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifdef _WIN32
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif
#if defined(__GNUC__)
#define INSIDE static inline __attribute__((always_inline))
#else
#define INSIDE static inline
#endif

enum { NONE = 0, SILU = 1, RELU = 2 };

INSIDE int32_t bits_of(float x) {
    int32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

INSIDE float float_of(int32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* e^x for -87 <= x <= 87, off by at most 2 units of the last place (Cephes, expf). */
INSIDE float exponential(float x) {
    const float magic = 12582912.0f;
    float shifted = x * 1.44269504f + magic, whole = shifted - magic;
    float rest = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    float sum = 1.9875691500e-4f;
    sum = sum * rest + 1.3981999507e-3f;
    sum = sum * rest + 8.3334519073e-3f;
    sum = sum * rest + 4.1665795894e-2f;
    sum = sum * rest + 1.6666665459e-1f;
    sum = sum * rest + 5.0000001201e-1f;
    sum = sum * rest * rest + rest + 1.0f;
    /* unsigned: of what is no number the shift overflows */
    uint32_t power = ((uint32_t)bits_of(shifted) - 0x4B400000u + 127u) << 23;
    return sum * float_of((int32_t)power);
}

INSIDE void finish(float *restrict y, int64_t width, float scale, const float *restrict bias, int activation) {
    if (bias)
        for (int64_t k = 0; k < width; k++) y[k] = y[k] * scale + bias[k];
    else
        for (int64_t k = 0; k < width; k++) y[k] = y[k] * scale;
    if (activation == SILU)
        for (int64_t k = 0; k < width; k++) {
            float x = y[k], turned = -x;
            turned = turned > 87.0f ? 87.0f : turned;
            turned = turned < -87.0f ? -87.0f : turned;
            y[k] = x / (1.0f + exponential(turned));
        }
    else if (activation == RELU)
        for (int64_t k = 0; k < width; k++) y[k] = y[k] < 0.0f ? 0.0f : y[k];
}

INSIDE float quantize(const float *restrict x, int64_t width, int8_t *restrict out) {
    int32_t largest = 0;
    for (int64_t k = 0; k < width; k++) {
        int32_t bits = bits_of(x[k]) & 0x7fffffff;
        largest = bits > largest ? bits : largest;
    }
    if (largest >= 0x7f800000) {
        memset(out, 0, (size_t)width);
        return NAN;
    }
    float most = float_of(largest);
    most = most < 1e-30f ? 1e-30f : most;
    float inverse = 127.0f / most;
    for (int64_t k = 0; k < width; k++) out[k] = (int8_t)(bits_of(x[k] * inverse + 12582912.0f) - 0x4B400000);
    return most / 127.0f;
}

INSIDE void rows(float *y, int64_t n, int64_t width, const float *scale, const float *bias, int activation, int8_t *out,
                 float *out_scale) {
    for (int64_t row = 0; row < n; row++) {
        float *one = y + row * width;
        if (scale) finish(one, width, scale[row], bias, activation);
        if (out) out_scale[row] = quantize(one, width, out + row * width);
    }
}

#define ARGUMENTS \
    float *y, int64_t n, int64_t width, const float *scale, const float *bias, int activation, int8_t *out, float *out_scale
#define PASSED y, n, width, scale, bias, activation, out, out_scale

static void rows_plain(ARGUMENTS) { rows(PASSED); }
#if defined(__GNUC__) && defined(__x86_64__)
__attribute__((target("avx2,fma"))) static void rows_avx2(ARGUMENTS) { rows(PASSED); }
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))) static void rows_avx512(ARGUMENTS) { rows(PASSED); }
#endif

/* Which instructions this processor has: 0 any, 1 AVX2, 2 AVX-512. */
EXPORT int32_t chiasm_int8_rows_widest(void) {
#if defined(__GNUC__) && defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return 2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
    return 0;
}

/* scale NULL: rows are only quantised, and y is only read. out NULL: rows are only finished. bias may be NULL. */
EXPORT void chiasm_int8_rows(ARGUMENTS, int32_t widest) {
#if defined(__GNUC__) && defined(__x86_64__)
    if (widest == 2) {
        rows_avx512(PASSED);
        return;
    }
    if (widest == 1) {
        rows_avx2(PASSED);
        return;
    }
#endif
    rows_plain(PASSED);
}

EXPORT int32_t chiasm_int8_rows_version(void) { return 1; }
