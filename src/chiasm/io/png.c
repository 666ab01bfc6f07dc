/* The prediction of PNG taken back: what inflating a file gives, rows that begin with the number of their filter, to pixels.
 *
 * The filters (PNG specification, third edition, section 9) predict a byte from its neighbours to the left (a), above (b)
 * and above left (c), so that byte waits for byte. Here eight rows go at once, each one pixel behind the row above it: what
 * a row needs of the one above was computed a step before. Each of the eight may have a filter of its own.
 *
 * io/png.py is the Python face. Only x86-64 (SSE2, which each of them has); elsewhere Pillow decodes.
 */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if !defined(__x86_64__) || !defined(__GNUC__)
#error "built for x86-64 by gcc or clang only; elsewhere Pillow decodes"
#endif

#include <emmintrin.h>

#define VERSION 1 /* of the interface below; io/png.py refuses another */
#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))
#define ROWS 8
#define STEP 16 /* bytes of each row between two turnings */

/* What the eight rows remember of the step before: the bytes found, and what stood above them. */
typedef struct {
    __m128i found, above;
} state_t;

INLINE __m128i magnitude(__m128i x) { return _mm_max_epi16(x, _mm_sub_epi16(_mm_setzero_si128(), x)); }

INLINE __m128i choose(__m128i mask, __m128i yes, __m128i no) {
    return _mm_or_si128(_mm_and_si128(mask, yes), _mm_andnot_si128(mask, no));
}

/* One byte of each row. `masks` say which rows have the filters 1 to 4, `top` is the byte above the first row. */
INLINE __m128i step(state_t *state, __m128i residual, int top, const __m128i *masks) {
    __m128i a = state->found, c = state->above;
    __m128i b = _mm_insert_epi16(_mm_slli_si128(a, 2), top, 0);
    __m128i from_b = _mm_sub_epi16(b, c), from_a = _mm_sub_epi16(a, c);
    __m128i pa = magnitude(from_b), pb = magnitude(from_a), pc = magnitude(_mm_add_epi16(from_a, from_b));
    __m128i nearest = choose(_mm_cmpgt_epi16(pb, pc), c, b);
    __m128i paeth = choose(_mm_cmpgt_epi16(pa, _mm_min_epi16(pb, pc)), nearest, a);
    __m128i mean = _mm_srli_epi16(_mm_add_epi16(a, b), 1);
    __m128i guess = _mm_or_si128(
        _mm_or_si128(_mm_and_si128(masks[0], a), _mm_and_si128(masks[1], b)),
        _mm_or_si128(_mm_and_si128(masks[2], mean), _mm_and_si128(masks[3], paeth))
    );
    state->above = b;
    state->found = _mm_and_si128(_mm_add_epi16(residual, guess), _mm_set1_epi16(255));
    return state->found;
}

/* Eight rows of 16 bytes to 16 columns of 8 bytes, two in each of eight vectors. */
INLINE void turn(const uint8_t *in, ptrdiff_t stride, __m128i *columns) {
    __m128i r[8], s[8];
    for (int i = 0; i < 8; i++) r[i] = _mm_loadu_si128((const __m128i *)(in + i * stride));
    for (int i = 0; i < 4; i++) {
        s[2 * i] = _mm_unpacklo_epi8(r[i], r[i + 4]);
        s[2 * i + 1] = _mm_unpackhi_epi8(r[i], r[i + 4]);
    }
    /* s[2i] holds columns 0-7 of rows i and i + 4 in turn, s[2i + 1] columns 8-15. */
    for (int half = 0; half < 2; half++) {
        __m128i even_low = _mm_unpacklo_epi8(s[half], s[4 + half]), even_high = _mm_unpackhi_epi8(s[half], s[4 + half]);
        __m128i odd_low = _mm_unpacklo_epi8(s[2 + half], s[6 + half]),
                odd_high = _mm_unpackhi_epi8(s[2 + half], s[6 + half]);
        columns[4 * half] = _mm_unpacklo_epi8(even_low, odd_low);
        columns[4 * half + 1] = _mm_unpackhi_epi8(even_low, odd_low);
        columns[4 * half + 2] = _mm_unpacklo_epi8(even_high, odd_high);
        columns[4 * half + 3] = _mm_unpackhi_epi8(even_high, odd_high);
    }
}

/* The way back. */
INLINE void turn_back(const __m128i *columns, uint8_t *out, ptrdiff_t stride) {
    __m128i a[8], b[8];
    memcpy(a, columns, sizeof a);
    for (int stage = 0; stage < 4; stage++) {
        for (int i = 0; i < 4; i++) {
            b[2 * i] = _mm_unpacklo_epi8(a[i], a[i + 4]);
            b[2 * i + 1] = _mm_unpackhi_epi8(a[i], a[i + 4]);
        }
        memcpy(a, b, sizeof a);
    }
    for (int i = 0; i < 8; i++) _mm_storeu_si128((__m128i *)(out + i * stride), a[i]);
}

/* Eight rows. `work` holds ROWS lines of `stride` bytes, each row `pixel` bytes further right than the one above, zeros
 * around; `above` holds stride bytes, the row above from its byte 0 on. The bytes found replace those in `work`. */
INLINE void unfilter_rows(
    uint8_t *work, ptrdiff_t stride, ptrdiff_t columns, const uint8_t *above, const int *filters, const int pixel
) {
    __m128i masks[4];
    state_t states[3];
    memset(states, 0, sizeof states);
    for (int f = 0; f < 4; f++) {
        int16_t lanes[ROWS];
        for (int k = 0; k < ROWS; k++) lanes[k] = (int16_t)(filters[k] == f + 1 ? -1 : 0);
        masks[f] = _mm_loadu_si128((const __m128i *)lanes);
    }
    for (ptrdiff_t j = 0; j < columns; j += 3 * STEP) { /* 48 bytes: whole pixels of 1 and of 3 bytes */
        for (int part = 0; part < 3; part++) {
            __m128i turned[8], results[8];
            turn(work + j + part * STEP, stride, turned);
            for (int i = 0; i < 8; i++) {
                const uint8_t *top = above + j + part * STEP + 2 * i;
                __m128i zero = _mm_setzero_si128();
                int s = (part * STEP + 2 * i) % pixel;
                __m128i first = step(&states[s], _mm_unpacklo_epi8(turned[i], zero), top[0], masks);
                s = (part * STEP + 2 * i + 1) % pixel;
                __m128i second = step(&states[s], _mm_unpackhi_epi8(turned[i], zero), top[1], masks);
                results[i] = _mm_packus_epi16(first, second);
            }
            turn_back(results, work + j + part * STEP, stride);
        }
    }
}

EXPORT int32_t chiasm_png_version(void) { return VERSION; }

/* Take back the filters of `height` rows of 1 + width * pixel bytes in `raw`; `out` takes height rows of width * pixel.
 *
 * `pixel` is 1 or 3 bytes. Returns 0, -1 without memory, -2 for a filter that does not exist. The caller has checked that
 * both buffers are as long as this says.
 */
EXPORT int32_t chiasm_png(const uint8_t *raw, int32_t width, int32_t height, int32_t pixel, uint8_t *out) {
    ptrdiff_t bytes = (ptrdiff_t)width * pixel, skewed = bytes + (ROWS - 1) * pixel;
    ptrdiff_t columns = (skewed + 3 * STEP - 1) / (3 * STEP) * (3 * STEP);
    uint8_t *work = malloc((size_t)columns * ROWS), *above = calloc((size_t)columns, 1);
    int32_t code = work && above ? 0 : -1;

    for (int32_t y = 0; y < height && code == 0; y += ROWS) {
        int filters[ROWS] = {0};
        int32_t rows = height - y < ROWS ? height - y : ROWS;
        memset(work, 0, (size_t)columns * ROWS);
        for (int32_t k = 0; k < rows; k++) {
            const uint8_t *row = raw + (y + k) * (bytes + 1);
            filters[k] = row[0];
            if (row[0] > 4) code = -2;
            memcpy(work + k * columns + k * pixel, row + 1, (size_t)bytes);
        }
        if (code) break;
        if (pixel == 1)
            unfilter_rows(work, columns, columns, above, filters, 1);
        else
            unfilter_rows(work, columns, columns, above, filters, 3);
        for (int32_t k = 0; k < rows; k++)
            memcpy(out + (y + k) * bytes, work + k * columns + k * pixel, (size_t)bytes);
        memcpy(above, out + (y + rows - 1) * bytes, (size_t)bytes);
    }
    free(work);
    free(above);
    return code;
}
