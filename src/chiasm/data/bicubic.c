/* Pillow's antialiased bicubic resize, then a centre crop, bit for bit, computing only what the crop keeps.
 *
 * Comes in: 8-bit pixels (height, width, channels), rows without gaps. Goes out: 8-bit pixels (crop_height, crop_width,
 * channels), or three float32 planes through a look-up table of 256 values a plane. data/bicubic.py is its Python face.
 *
 * What has to be reproduced of Pillow's arithmetic: Keys' cubic with a = -0.5, widened by the scale when reducing;
 * weights in double, divided by their sum, rounded to 22 bits; two passes, the horizontal one first and rounded to
 * 8 bits; sums in int32 that begin with one half.
 *
 * Both passes work on columns of bytes that share one weight, which compilers turn into vector code. For that the
 * horizontal pass turns blocks of 32 rows on their side. Plain C except for the turning of 16 x 16 bytes (SSE2, which
 * every x86-64 has). Nothing here is sized by a constant that an image could exceed: all buffers are allocated from the
 * sizes, which the caller has checked.
 *
 * Only x86-64: elsewhere compilers may fuse the multiplications and additions of the weights (here this file is built
 * with -ffp-contract=off), and nobody has compared the bits.
 */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define VERSION 1 /* of the interface below; data/bicubic.py refuses another */
#define BITS 22   /* of a weight */
#define ROWS 32   /* of a block of the horizontal pass */
#define CHUNK 64  /* bytes of a row that the vertical pass sums up at a time */

#if defined(__x86_64__) && defined(__GNUC__)

#include <emmintrin.h>

#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))

/* The weights of `count` outputs: those of output i begin at weights[i * taps] and belong to `length[i]` inputs from
 * `first[i]` on. */
typedef struct {
    int32_t count, taps;
    int32_t *first, *length, *weights;
} axis_t;

static double cubic(double x) {
    const double a = -0.5;
    if (x < 0.0) x = -x;
    if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
    if (x < 2.0) return (((x - 5) * x + 8) * x - 4) * a;
    return 0.0;
}

static void free_axis(axis_t *axis) {
    free(axis->first);
    free(axis->length);
    free(axis->weights);
}

/* The weights of the outputs `start` to `start + count` of an axis of `in` pixels resized to `out`. */
static int make_axis(axis_t *axis, int32_t in, int32_t out, int32_t start, int32_t count) {
    double scale = (double)in / out, stretch = scale < 1.0 ? 1.0 : scale;
    double support = 2.0 * stretch, shrink = 1.0 / stretch;
    size_t taps = (size_t)ceil(support) * 2 + 1;
    double *exact = malloc(taps * sizeof(double));

    axis->count = count;
    axis->taps = (int32_t)taps;
    axis->first = malloc((size_t)count * sizeof(int32_t));
    axis->length = malloc((size_t)count * sizeof(int32_t));
    axis->weights = malloc((size_t)count * taps * sizeof(int32_t));
    if (!exact || !axis->first || !axis->length || !axis->weights) {
        free(exact);
        return 0;
    }
    for (int32_t i = 0; i < count; i++) {
        double centre = (start + i + 0.5) * scale, sum = 0.0;
        int32_t first = (int32_t)(centre - support + 0.5), last = (int32_t)(centre + support + 0.5);
        int32_t *weights = axis->weights + (size_t)i * taps;
        if (first < 0) first = 0;
        if (last > in) last = in;
        for (int32_t k = 0; k < last - first; k++) {
            exact[k] = cubic((k + first - centre + 0.5) * shrink);
            sum += exact[k];
        }
        for (int32_t k = 0; k < last - first; k++) {
            double weight = sum != 0.0 ? exact[k] / sum : exact[k];
            weights[k] = (int32_t)(weight * (1 << BITS) + (weight < 0 ? -0.5 : 0.5));
        }
        axis->first[i] = first;
        axis->length[i] = last - first;
    }
    free(exact);
    return 1;
}

/* 16 rows of 16 bytes become 16 columns. */
INLINE void turn_16(const uint8_t *in, ptrdiff_t in_stride, uint8_t *out, ptrdiff_t out_stride) {
    __m128i a[16], b[16];
    for (int i = 0; i < 16; i++) a[i] = _mm_loadu_si128((const __m128i *)(in + i * in_stride));
    for (int step = 0; step < 4; step++) {
        for (int i = 0; i < 8; i++) {
            b[2 * i] = _mm_unpacklo_epi8(a[i], a[i + 8]);
            b[2 * i + 1] = _mm_unpackhi_epi8(a[i], a[i + 8]);
        }
        memcpy(a, b, sizeof a);
    }
    for (int i = 0; i < 16; i++) _mm_storeu_si128((__m128i *)(out + i * out_stride), a[i]);
}

/* `rows` rows of `columns` bytes become `columns` rows. Strides in bytes; `in` and `out` hold no more than that. */
INLINE void turn(
    const uint8_t *in, ptrdiff_t in_stride, int32_t rows, int32_t columns, uint8_t *out, ptrdiff_t out_stride
) {
    int32_t whole_rows = rows & ~15, whole_columns = columns & ~15;
    for (int32_t y = 0; y < whole_rows; y += 16)
        for (int32_t x = 0; x < whole_columns; x += 16)
            turn_16(in + y * in_stride + x, in_stride, out + x * out_stride + y, out_stride);
    for (int32_t y = 0; y < rows; y++)
        for (int32_t x = y < whole_rows ? whole_columns : 0; x < columns; x++)
            out[x * out_stride + y] = in[y * in_stride + x];
}

INLINE uint8_t rounded(int32_t sum) {
    sum >>= BITS;
    return (uint8_t)(sum < 0 ? 0 : sum > 255 ? 255 : sum);
}

/* Weighted sums of `n` columns: lines of bytes, `stride` apart, one weight each. `n` is a constant where it is called. */
INLINE void sum_lines(
    const uint8_t *lines, ptrdiff_t stride, const int32_t *weights, int32_t length, uint8_t *out, const int n
) {
    int32_t sums[CHUNK];
    for (int j = 0; j < n; j++) sums[j] = 1 << (BITS - 1);
    for (int32_t k = 0; k < length; k++) {
        const uint8_t *line = lines + k * stride;
        int32_t weight = weights[k];
        for (int j = 0; j < n; j++) sums[j] += weight * line[j];
    }
    for (int j = 0; j < n; j++) out[j] = rounded(sums[j]);
}

/* The horizontal pass of `rows` rows: `in` begins with the first column that is needed, `begin`. */
INLINE void pass_x(
    const uint8_t *in, ptrdiff_t in_stride, int32_t rows, int32_t channels, const axis_t *axis, int32_t begin,
    int32_t columns, uint8_t *turned, uint8_t *sums, uint8_t *out
) {
    int32_t width = axis->count * channels;
    for (int32_t y = 0; y < rows; y += ROWS) {
        int32_t block = rows - y < ROWS ? rows - y : ROWS;
        turn(in + y * in_stride, in_stride, block, columns * channels, turned, ROWS);
        for (int32_t i = 0; i < axis->count; i++)
            for (int32_t c = 0; c < channels; c++)
                sum_lines(turned + ((ptrdiff_t)(axis->first[i] - begin) * channels + c) * ROWS,
                          (ptrdiff_t)channels * ROWS, axis->weights + (size_t)i * axis->taps, axis->length[i],
                          sums + ((ptrdiff_t)i * channels + c) * ROWS, ROWS);
        turn(sums, ROWS, width, block, out + (ptrdiff_t)y * width, width);
    }
}

/* One row of the vertical pass; `in` is the first of the rows that it sums up. */
INLINE void pass_y(
    const uint8_t *in, ptrdiff_t in_stride, int32_t bytes, const int32_t *weights, int32_t length, uint8_t *out
) {
    int32_t x = 0;
    for (; x + CHUNK <= bytes; x += CHUNK) sum_lines(in + x, in_stride, weights, length, out + x, CHUNK);
    for (; x + 16 <= bytes; x += 16) sum_lines(in + x, in_stride, weights, length, out + x, 16);
    for (; x < bytes; x++) sum_lines(in + x, in_stride, weights, length, out + x, 1);
}

/* One row of pixels into three planes of floats. */
INLINE void look_up(const uint8_t *row, int32_t width, int32_t channels, const float *table, float *out, ptrdiff_t plane) {
    for (int32_t c = 0; c < 3; c++) {
        const float *values = table + 256 * c;
        float *line = out + c * plane;
        if (channels == 1)
            for (int32_t x = 0; x < width; x++) line[x] = values[row[x]];
        else
            for (int32_t x = 0; x < width; x++) line[x] = values[row[3 * x + c]];
    }
}

/* What one call works on; x and y are null where that axis keeps its size. */
typedef struct {
    const uint8_t *pixels; /* begins with the first row and column that are needed */
    ptrdiff_t stride;
    int32_t channels, width, height;     /* of the crop */
    int32_t columns, rows, begin, above; /* of the source that are needed, and where they begin */
    const axis_t *x, *y;
    uint8_t *turned, *sums, *between, *row;
    uint8_t *picture; /* either this */
    const float *table;
    float *planes; /* or these */
} job_t;

INLINE void work(const job_t *job) {
    const uint8_t *between = job->pixels;
    ptrdiff_t stride = job->stride;
    int32_t bytes = job->width * job->channels;
    if (job->x) {
        pass_x(job->pixels, job->stride, job->rows, job->channels, job->x, job->begin, job->columns, job->turned,
               job->sums, job->between);
        between = job->between;
        stride = bytes;
    }
    for (int32_t i = 0; i < job->height; i++) {
        uint8_t *out = job->picture ? job->picture + (ptrdiff_t)i * bytes : job->row;
        const uint8_t *row = out;
        if (job->y)
            pass_y(between + (job->y->first[i] - job->above) * stride, stride, bytes,
                   job->y->weights + (size_t)i * job->y->taps, job->y->length[i], out);
        else if (job->picture)
            memcpy(out, between + i * stride, (size_t)bytes);
        else
            row = between + i * stride;
        if (!job->picture)
            look_up(row, job->width, job->channels, job->table, job->planes + (ptrdiff_t)i * job->width,
                    (ptrdiff_t)job->width * job->height);
    }
}

static void work_plain(const job_t *job) { work(job); }

__attribute__((target("avx2"))) static void work_avx2(const job_t *job) { work(job); }

__attribute__((target("avx2,avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512"))) static void work_avx512(
    const job_t *job
) {
    work(job);
}

/* The widest instructions that this machine has: 0 none beyond x86-64, 1 AVX2, 2 AVX-512. */
EXPORT int32_t chiasm_bicubic_widest(void) {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        return 2;
    return __builtin_cpu_supports("avx2") ? 1 : 0;
}

EXPORT int32_t chiasm_bicubic_version(void) { return VERSION; }

/* Resize `pixels` (height, width, channels) to (resized_height, resized_width) and keep the crop.
 *
 * Either `picture` takes the crop's bytes, or, where it is null, `planes` takes table[c][value] (3, crop_height,
 * crop_width). `wide` limits the instructions (see chiasm_bicubic_widest). Returns 0, or -1 without memory. The caller
 * has checked: channels is 1 or 3, every side is 1 to 65,536, the crop lies inside the resized picture.
 */
EXPORT int32_t chiasm_bicubic(
    const uint8_t *pixels, int32_t width, int32_t height, int32_t channels, int32_t resized_width,
    int32_t resized_height, int32_t left, int32_t top, int32_t crop_width, int32_t crop_height, int32_t wide,
    uint8_t *picture, const float *table, float *planes
) {
    axis_t x = {0}, y = {0};
    int same_x = width == resized_width, same_y = height == resized_height, done = 0;
    size_t bytes = (size_t)crop_width * (size_t)channels;
    job_t job = {.channels = channels, .width = crop_width, .height = crop_height, .columns = crop_width,
                 .rows = crop_height, .begin = left, .above = top, .stride = (ptrdiff_t)width * channels,
                 .picture = picture, .table = table, .planes = planes};

    if (!same_y) {
        if (!make_axis(&y, height, resized_height, top, crop_height)) goto end;
        job.above = y.first[0];
        job.rows = y.first[crop_height - 1] + y.length[crop_height - 1] - job.above;
        job.y = &y;
    }
    if (!same_x) {
        if (!make_axis(&x, width, resized_width, left, crop_width)) goto end;
        job.begin = x.first[0];
        job.columns = x.first[crop_width - 1] + x.length[crop_width - 1] - job.begin;
        job.x = &x;
        job.turned = calloc((size_t)job.columns * (size_t)channels, ROWS);
        job.sums = malloc(bytes * ROWS);
        job.between = malloc(bytes * (size_t)job.rows);
        if (!job.turned || !job.sums || !job.between) goto end;
    }
    job.row = malloc(bytes);
    if (!job.row) goto end;
    job.pixels = pixels + job.above * job.stride + (ptrdiff_t)job.begin * channels;
    if (wide > 1)
        work_avx512(&job);
    else if (wide == 1)
        work_avx2(&job);
    else
        work_plain(&job);
    done = 1;
end:
    free_axis(&x);
    free_axis(&y);
    free(job.turned);
    free(job.sums);
    free(job.between);
    free(job.row);
    return done ? 0 : -1;
}

#else

#error "built for x86-64 by gcc or clang only; elsewhere Pillow resizes"

#endif
