/* Attention of a few queries over segments of different lengths, shared out to all cores (native.py).
 *
 * A segment is what one (row, kv head) stores: count[i] entries and `tail` newer ones, in order, with room for others
 * behind them: segment i + 1 begins count[i] + room entries after segment i. Every segment has its own queries.
 *
 * The entries of all segments, one after the other, are cut into one stretch per thread, wherever that falls. A thread
 * reads the part of each segment that lies in its stretch once, for all queries, with a running softmax (FlashAttention,
 * arXiv 2205.14135, section 3.1), and what two threads read of one segment is put together by the sums of their softmax
 * (Flash-Decoding). Part (segment i, thread t) is kept at place i + t, which no other has: both only ever go up.
 * Everything is added up in float32.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define BLOCK 32 /* entries at hand at once: 128 numbers of each, as float32, are 16 KiB of a core's L1 */

typedef uint16_t bfloat16;

INLINE float from_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

INLINE float load(const void *numbers, int64_t i, int half) {
    return half ? from_bits((uint32_t)((const bfloat16 *)numbers)[i] << 16) : ((const float *)numbers)[i];
}

INLINE void store(void *numbers, int64_t i, float x, int half) {
    uint32_t bits;
    if (!half) {
        ((float *)numbers)[i] = x;
        return;
    }
    memcpy(&bits, &x, sizeof bits);
    bits = x != x ? 0x7fc00000u : bits + 0x7fffu + ((bits >> 16) & 1); /* to the nearest, ties to even */
    ((bfloat16 *)numbers)[i] = (bfloat16)(bits >> 16);
}

/* e^x for x <= 0, to 2 units in the last place; one that compilers vectorise. Cephes' expf. NaN stays NaN. */
INLINE float exp_of(float x) {
    x = x < -87.0f ? -87.0f : x;
    float n = floorf(x * 1.44269504f + 0.5f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t power = (int32_t)(n >= -126.0f ? n : -126.0f); /* of a NaN, which is no integer, too */
    return p * from_bits((uint32_t)(power + 127) << 23);
}

/* Rows [m, width] as float32: themselves, or converted into `tile`, once for all queries. */
INLINE const float *rows_of(const void *numbers, int64_t from, int64_t m, int64_t width, int half, float *tile) {
    if (!half)
        return (const float *)numbers + from * width;
    for (int64_t i = 0; i < m * width; i++)
        tile[i] = load(numbers, from * width + i, 1);
    return tile;
}

/* A part, per query: the weighted values [width], the greatest logit, the sum of the softmax. */
INLINE void read(const float *queries, const void *keys, const void *values, int64_t first, int64_t n,
                 int64_t n_queries, int64_t width, int half, float *tile, float *part) {
    float *weights = tile + (half ? BLOCK * width : 0); /* [queries, BLOCK] */
    for (int64_t q = 0; q < n_queries; q++) {
        float *sums = part + q * (width + 2);
        memset(sums, 0, (size_t)width * sizeof *sums);
        sums[width] = -INFINITY;
        sums[width + 1] = 0;
    }
    for (int64_t from = first; from < first + n; from += BLOCK) {
        int64_t m = first + n - from < BLOCK ? first + n - from : BLOCK;
        const float *rows = rows_of(keys, from, m, width, half, tile);
        for (int64_t q = 0; q < n_queries; q++) {
            const float *query = queries + q * width;
            float *restrict sums = part + q * (width + 2), *restrict weight = weights + q * BLOCK;
            float top = sums[width], total = 0;
            int64_t j = 0;
            for (; j + 4 <= m; j += 4) { /* four at once: the query is read a quarter as often */
                const float *row = rows + j * width;
                float a = 0, b = 0, c = 0, e = 0;
                for (int64_t d = 0; d < width; d++) {
                    a += query[d] * row[d];
                    b += query[d] * row[width + d];
                    c += query[d] * row[2 * width + d];
                    e += query[d] * row[3 * width + d];
                }
                weight[j] = a, weight[j + 1] = b, weight[j + 2] = c, weight[j + 3] = e;
            }
            for (; j < m; j++) {
                float logit = 0;
                for (int64_t d = 0; d < width; d++)
                    logit += query[d] * rows[j * width + d];
                weight[j] = logit;
            }
            for (int64_t j = 0; j < m; j++)
                top = weight[j] > top ? weight[j] : top;
            if (top > sums[width]) {
                float shrink = exp_of(sums[width] - top);
                for (int64_t d = 0; d < width; d++)
                    sums[d] *= shrink;
                sums[width] = top;
                sums[width + 1] *= shrink;
            }
            for (int64_t j = 0; j < m; j++) {
                weight[j] = exp_of(weight[j] - top);
                total += weight[j];
            }
            sums[width + 1] += total;
        }
        rows = rows_of(values, from, m, width, half, tile);
        for (int64_t q = 0; q < n_queries; q++) {
            const float *weight = weights + q * BLOCK;
            float *restrict sums = part + q * (width + 2);
            int64_t j = 0;
            for (; j + 4 <= m; j += 4) { /* four at once: the sums are read and written a quarter as often */
                const float *row = rows + j * width;
                for (int64_t d = 0; d < width; d++)
                    sums[d] += weight[j] * row[d] + weight[j + 1] * row[width + d] +
                               weight[j + 2] * row[2 * width + d] + weight[j + 3] * row[3 * width + d];
            }
            for (; j < m; j++)
                for (int64_t d = 0; d < width; d++)
                    sums[d] += weight[j] * rows[j * width + d];
        }
    }
}

/* The same, for widths and dtypes that the compiler knows beforehand. */
static void read_any(const float *queries, const void *keys, const void *values, int64_t first, int64_t n,
                     int64_t n_queries, int64_t width, int half, float *tile, float *part) {
    if (width == 64 && half)
        read(queries, keys, values, first, n, n_queries, 64, 1, tile, part);
    else if (width == 64)
        read(queries, keys, values, first, n, n_queries, 64, 0, tile, part);
    else if (width == 128 && half)
        read(queries, keys, values, first, n, n_queries, 128, 1, tile, part);
    else if (width == 128)
        read(queries, keys, values, first, n, n_queries, 128, 0, tile, part);
    else if (half)
        read(queries, keys, values, first, n, n_queries, width, 1, tile, part);
    else
        read(queries, keys, values, first, n, n_queries, width, 0, tile, part);
}

typedef struct {
    const void *keys, *values;
    const float *queries; /* [segments, queries, width], scaled */
    const int64_t *counts;
    int64_t n_segments, tail, room, n_queries, width, total, n_threads;
    int half;
    float *parts;
    float *tiles; /* per thread: a block of rows as float32, if they are not, and its weights */
} Work;

INLINE int64_t tile_size(const Work *w) { return BLOCK * ((w->half ? w->width : 0) + w->n_queries); }

INLINE int64_t stretch(const Work *w, int64_t thread) { return w->total * thread / w->n_threads; }

static void read_stretch(const Work *w, int64_t thread) {
    int64_t begin = stretch(w, thread), end = stretch(w, thread + 1);
    int64_t rank = 0, slot = 0; /* of the segment's first entry: among those stored, and in the buffer */
    for (int64_t i = 0; i < w->n_segments && rank < end; i++) {
        int64_t size = w->counts[i] + w->tail;
        int64_t from = begin > rank ? begin - rank : 0, to = end - rank < size ? end - rank : size;
        if (from < to)
            read_any(w->queries + i * w->n_queries * w->width, w->keys, w->values, slot + from, to - from,
                     w->n_queries, w->width, w->half, w->tiles + thread * tile_size(w),
                     w->parts + (i + thread) * w->n_queries * (w->width + 2));
        rank += size;
        slot += w->counts[i] + w->room;
    }
}

static void put_together(const Work *w, void *output) {
    int64_t rank = 0, thread = 0;
    for (int64_t i = 0; i < w->n_segments; i++) {
        int64_t end = rank + w->counts[i] + w->tail;
        while (stretch(w, thread + 1) <= rank)
            thread++;
        for (int64_t q = 0; q < w->n_queries; q++) {
            float *sums = w->parts + ((i + thread) * w->n_queries + q) * (w->width + 2);
            for (int64_t t = thread + 1; t < w->n_threads && stretch(w, t) < end; t++) {
                if (stretch(w, t) == stretch(w, t + 1))
                    continue; /* fewer entries than threads */
                const float *more = w->parts + ((i + t) * w->n_queries + q) * (w->width + 2);
                float top = more[w->width] > sums[w->width] ? more[w->width] : sums[w->width];
                float mine = exp_of(sums[w->width] - top), other = exp_of(more[w->width] - top);
                for (int64_t d = 0; d < w->width; d++)
                    sums[d] = sums[d] * mine + more[d] * other;
                sums[w->width + 1] = sums[w->width + 1] * mine + more[w->width + 1] * other;
                sums[w->width] = top;
            }
            for (int64_t d = 0; d < w->width; d++)
                store(output, (i * w->n_queries + q) * w->width + d, sums[d] / sums[w->width + 1], w->half);
        }
        rank = end;
    }
}

/* queries, output [segments, n_queries, width]; keys, values [entries, width]. No segment may be empty.
 * Returns 0, or 1 where there is no memory for it. */
int sparsekv_attend(const void *queries, const void *keys, const void *values, void *output, const int64_t *counts,
                    int64_t n_segments, int64_t tail, int64_t room, int64_t n_queries, int64_t width, float scale,
                    int half, int64_t n_threads) {
    int64_t n_numbers = n_segments * n_queries * width;
    int64_t n_parts = (n_segments + n_threads) * n_queries * (width + 2);
    Work work = {keys, values, NULL, counts, n_segments, tail, room, n_queries, width, 0, n_threads, half, NULL, NULL};
    float *memory = malloc((size_t)(n_numbers + n_parts + n_threads * tile_size(&work)) * sizeof *memory);
    if (!memory)
        return 1;
    work.queries = memory;
    work.parts = memory + n_numbers;
    work.tiles = work.parts + n_parts;
    for (int64_t i = 0; i < n_numbers; i++)
        memory[i] = load(queries, i, half) * scale;
    for (int64_t i = 0; i < n_segments; i++)
        work.total += counts[i] + tail;
    if (n_threads == 1) {
        read_stretch(&work, 0);
    } else {
#pragma omp parallel for num_threads(n_threads) schedule(static, 1)
        for (int64_t t = 0; t < n_threads; t++)
            read_stretch(&work, t);
    }
    put_together(&work, output);
    free(memory);
    return 0;
}
