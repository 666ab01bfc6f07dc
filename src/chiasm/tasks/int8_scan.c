/* Exact int32 dot products of int8 rows with int8 queries, for searching (quantized.py).
 *
 * In: rows (n, width) and queries (m, width) of int8 in -127..127, width a multiple of 64. Out: scores[q * stride + row].
 * The sums are exact: nothing saturates on any path for width <= 65,536. Which instructions are used is asked of the
 * processor once. Built as an optional extension and called through ctypes; without it torch or fp32 gives the same
 * answer to a search.
 */
#include <stddef.h>
#include <stdint.h>

#ifdef _WIN32
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

typedef void (*scan_function)(const int8_t *, int64_t, const int8_t *, int64_t, int64_t, int32_t *, int64_t);

/* Any compiler, any processor. */
static void scan_plain(const int8_t *rows, int64_t n, const int8_t *queries, int64_t m, int64_t width,
                       int32_t *scores, int64_t stride)
{
    for (int64_t r = 0; r < n; r++)
        for (int64_t q = 0; q < m; q++) {
            const int8_t *x = rows + r * width, *y = queries + q * width;
            int32_t sum = 0;
            for (int64_t k = 0; k < width; k++)
                sum += (int16_t)x[k] * (int16_t)y[k];
            scores[q * stride + r] = sum;
        }
}

#if defined(__GNUC__) && defined(__x86_64__)
#include <immintrin.h>
#define INSIDE static inline __attribute__((always_inline))
#define VNNI __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")))
#define AVX2 __attribute__((target("avx2")))
#define TILE 4

/* Four vectors of partial sums to their four sums. */
INSIDE VNNI __m128i vnni_sums(const __m512i *part)
{
    __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(part[0], part[1]), _mm512_unpackhi_epi32(part[0], part[1]));
    __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(part[2], part[3]), _mm512_unpackhi_epi32(part[2], part[3]));
    __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
    return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

/* vpdpbusd multiplies unsigned with signed bytes, so 128 is added to the rows; 128 * sum(query) comes off again. */
INSIDE VNNI void vnni_tile(const int8_t *const *rows, const int8_t *queries, int64_t width, int32_t *scores,
                           int64_t stride, int64_t valid, const int count)
{
    const __m512i flip = _mm512_set1_epi8((char)0x80);
    __m512i part[TILE][TILE], shift[TILE];
    for (int q = 0; q < count; q++) {
        shift[q] = _mm512_setzero_si512();
        for (int r = 0; r < TILE; r++)
            part[q][r] = _mm512_setzero_si512();
    }
    for (int64_t k = 0; k < width; k += 64) {
        __m512i x[TILE];
        for (int r = 0; r < TILE; r++)
            x[r] = _mm512_xor_si512(_mm512_loadu_si512(rows[r] + k), flip);
        for (int q = 0; q < count; q++) {
            __m512i y = _mm512_loadu_si512(queries + q * width + k);
            shift[q] = _mm512_dpbusd_epi32(shift[q], flip, y);
            for (int r = 0; r < TILE; r++)
                part[q][r] = _mm512_dpbusd_epi32(part[q][r], x[r], y);
        }
    }
    for (int q = 0; q < count; q++) {
        __m128i off = _mm_set1_epi32(_mm512_reduce_add_epi32(shift[q]));
        _mm_mask_storeu_epi32(scores + q * stride, (__mmask8)((1 << valid) - 1),
                              _mm_sub_epi32(vnni_sums(part[q]), off));
    }
}

VNNI static void scan_vnni(const int8_t *rows, int64_t n, const int8_t *queries, int64_t m, int64_t width,
                           int32_t *scores, int64_t stride)
{
    for (int64_t r = 0; r < n; r += TILE) {
        const int8_t *x[TILE];
        int64_t valid = n - r < TILE ? n - r : TILE, q = 0;
        for (int i = 0; i < TILE; i++)
            x[i] = rows + (i < valid ? r + i : r) * width;
        for (; q + TILE <= m; q += TILE)
            vnni_tile(x, queries + q * width, width, scores + q * stride + r, stride, valid, TILE);
        for (; q < m; q++)
            vnni_tile(x, queries + q * width, width, scores + q * stride + r, stride, valid, 1);
    }
}

INSIDE AVX2 int32_t avx2_sum(__m256i part)
{
    __m128i half = _mm_add_epi32(_mm256_castsi256_si128(part), _mm256_extracti128_si256(part, 1));
    half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
    half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1));
    return _mm_cvtsi128_si32(half);
}

/* Widened to 16 bits first: vpmaddubsw would saturate. */
INSIDE AVX2 void avx2_tile(const int8_t *row, const int8_t *queries, int64_t width, int32_t *scores, int64_t stride,
                           const int count)
{
    __m256i part[TILE];
    for (int q = 0; q < count; q++)
        part[q] = _mm256_setzero_si256();
    for (int64_t k = 0; k < width; k += 16) {
        __m256i x = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(row + k)));
        for (int q = 0; q < count; q++) {
            __m256i y = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(queries + q * width + k)));
            part[q] = _mm256_add_epi32(part[q], _mm256_madd_epi16(x, y));
        }
    }
    for (int q = 0; q < count; q++)
        scores[q * stride] = avx2_sum(part[q]);
}

AVX2 static void scan_avx2(const int8_t *rows, int64_t n, const int8_t *queries, int64_t m, int64_t width,
                           int32_t *scores, int64_t stride)
{
    for (int64_t r = 0; r < n; r++) {
        int64_t q = 0;
        for (; q + TILE <= m; q += TILE)
            avx2_tile(rows + r * width, queries + q * width, width, scores + q * stride + r, stride, TILE);
        for (; q < m; q++)
            avx2_tile(rows + r * width, queries + q * width, width, scores + q * stride + r, stride, 1);
    }
}

static int supported(int path)
{
    __builtin_cpu_init();
    if (path == 2)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512vnni");
    return path == 0 || (path == 1 && __builtin_cpu_supports("avx2"));
}

static const scan_function paths[] = {scan_plain, scan_avx2, scan_vnni};
#else
static int supported(int path) { return path == 0; }
static const scan_function paths[] = {scan_plain};
#endif

/* Of the interface below; int8_scan.py refuses another. */
EXPORT int32_t chiasm_int8_scan_version(void) { return 1; }

/* The fastest path that this processor has: 0 plain, 1 AVX2, 2 AVX-512 with VNNI. */
EXPORT int chiasm_int8_best(void) { return supported(2) ? 2 : supported(1) ? 1 : 0; }

/* 0 when done, 1 when the processor lacks the path or a size is not allowed (nothing is written then). */
EXPORT int chiasm_int8_scan(int path, const int8_t *rows, int64_t n, const int8_t *queries, int64_t m, int64_t width,
                            int32_t *scores, int64_t stride)
{
    if (path < 0 || !supported(path) || n < 0 || m < 0 || width < 0 || width > 65536 || width % 64 || stride < n)
        return 1;
    paths[path](rows, n, queries, m, width, scores, stride);
    return 0;
}
