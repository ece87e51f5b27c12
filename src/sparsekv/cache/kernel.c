/* Attention of a few queries over segments of different lengths, shared out to all cores (kernel.py).
 *
 * A segment is what one (row, kv head) stores: count[i] entries and `tail` newer ones, in order, with room for others
 * behind them: segment i + 1 begins count[i] + room entries after segment i. Every segment has its own queries.
 *
 * Segments are cut into pieces of PIECE entries. A thread reads a piece once for all queries of its segment, with a
 * running softmax (FlashAttention, arXiv 2205.14135, section 3.1), and the pieces of a segment are put together by the
 * sums of their softmax (Flash-Decoding). So a segment's result depends on nothing but its own entries: not on the number
 * of threads, nor on other rows and heads. Everything is added up in float32.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define PIECE 256 /* entries that one thread reads at a time */
#define BLOCK 32  /* of them at hand at once: 128 numbers of each, as float32, are 16 KiB of a core's L1 */

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

/* e^x for x <= 0, 0 below -87; one that compilers vectorise. Cephes' expf: right to a few units in the last place near
 * 0, to 64 at -87. NaN stays NaN. */
INLINE float exp_of(float x) {
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
    return x < -87.0f ? 0.0f : p * from_bits((uint32_t)(power + 127) << 23);
}

/* What logits are measured from: the greatest, or 0 where all are -infinity, which weigh nothing. */
INLINE float base_of(float top) { return top == -INFINITY ? 0.0f : top; }

/* Rows [m, width] as float32: themselves, or converted into `tile`, once for all queries. */
INLINE const float *rows_of(const void *numbers, int64_t from, int64_t m, int64_t width, int half, float *tile) {
    if (!half)
        return (const float *)numbers + from * width;
    for (int64_t i = 0; i < m * width; i++)
        tile[i] = load(numbers, from * width + i, 1);
    return tile;
}

/* Per query: the weighted values [width], the greatest logit, the sum of the softmax. */
INLINE void read_piece(const float *queries, const void *keys, const void *values, int64_t first, int64_t n,
                 int64_t n_queries, int64_t width, int half, float *tile, float *result) {
    float *weights = tile + (half ? BLOCK * width : 0); /* [queries, BLOCK] */
    for (int64_t q = 0; q < n_queries; q++) {
        float *sums = result + q * (width + 2);
        memset(sums, 0, (size_t)width * sizeof *sums);
        sums[width] = -INFINITY;
        sums[width + 1] = 0;
    }
    for (int64_t from = first; from < first + n; from += BLOCK) {
        int64_t m = first + n - from < BLOCK ? first + n - from : BLOCK;
        const float *rows = rows_of(keys, from, m, width, half, tile);
        for (int64_t q = 0; q < n_queries; q++) {
            const float *query = queries + q * width;
            float *restrict sums = result + q * (width + 2), *restrict weight = weights + q * BLOCK;
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
            float base = base_of(top);
            for (int64_t j = 0; j < m; j++) {
                weight[j] = exp_of(weight[j] - base);
                total += weight[j];
            }
            sums[width + 1] += total;
        }
        rows = rows_of(values, from, m, width, half, tile);
        for (int64_t q = 0; q < n_queries; q++) {
            const float *weight = weights + q * BLOCK;
            float *restrict sums = result + q * (width + 2);
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
                     int64_t n_queries, int64_t width, int half, float *result) {
    float tile[BLOCK * ((half ? width : 0) + n_queries)]; /* rows as float32, where they are not, and weights */
    if (width == 64 && half)
        read_piece(queries, keys, values, first, n, n_queries, 64, 1, tile, result);
    else if (width == 64)
        read_piece(queries, keys, values, first, n, n_queries, 64, 0, tile, result);
    else if (width == 128 && half)
        read_piece(queries, keys, values, first, n, n_queries, 128, 1, tile, result);
    else if (width == 128)
        read_piece(queries, keys, values, first, n, n_queries, 128, 0, tile, result);
    else if (half)
        read_piece(queries, keys, values, first, n, n_queries, width, 1, tile, result);
    else
        read_piece(queries, keys, values, first, n, n_queries, width, 0, tile, result);
}

/* Add what `more` has to `sums`, both of `width` weighted values, greatest logit, sum. */
INLINE void add(float *restrict sums, const float *restrict more, int64_t width) {
    float top = more[width] > sums[width] ? more[width] : sums[width], base = base_of(top);
    float mine = exp_of(sums[width] - base), other = exp_of(more[width] - base);
    for (int64_t d = 0; d < width; d++)
        sums[d] = sums[d] * mine + more[d] * other;
    sums[width] = top;
    sums[width + 1] = sums[width + 1] * mine + more[width + 1] * other;
}

typedef struct {
    int64_t segment, first, n; /* entries `first` to `first + n` of the buffer */
} Piece;

INLINE int64_t pieces_of(int64_t n) { return (n + PIECE - 1) / PIECE; }

/* queries, output [segments, n_queries, width]; keys, values [entries, width]. No segment may be empty; n_queries and
 * width are small enough for the stack (read_any).
 * Returns 0, or 1 where there is no memory for it. */
int sparsekv_attend(const void *queries, const void *keys, const void *values, void *output, const int64_t *counts,
                    int64_t n_segments, int64_t tail, int64_t room, int64_t n_queries, int64_t width, float scale,
                    int half, int64_t n_threads) {
    int64_t n_pieces = 0, n_numbers = n_segments * n_queries * width;
    int64_t n_result = n_queries * (width + 2); /* of one piece */
    for (int64_t i = 0; i < n_segments; i++)
        n_pieces += pieces_of(counts[i] + tail);
    Piece *pieces = malloc((size_t)n_pieces * sizeof *pieces);
    float *scaled = malloc((size_t)(n_numbers + n_pieces * n_result) * sizeof *scaled);
    if (!pieces || !scaled) {
        free(pieces);
        free(scaled);
        return 1;
    }
    float *results = scaled + n_numbers;
    for (int64_t i = 0; i < n_numbers; i++)
        scaled[i] = load(queries, i, half) * scale;
    for (int64_t i = 0, at = 0, slot = 0; i < n_segments; slot += counts[i++] + room)
        for (int64_t from = 0, n = counts[i] + tail; from < n; from += PIECE)
            pieces[at++] = (Piece){i, slot + from, n - from < PIECE ? n - from : PIECE};

#define READ(p)                                                                                                    \
    read_any(scaled + pieces[p].segment * n_queries * width, keys, values, pieces[p].first, pieces[p].n, n_queries, \
             width, half, results + (p) * n_result)
    if (n_threads > 1) { /* not one team of one thread: in a forked process even that may wait for ever */
#pragma omp parallel for num_threads(n_threads) schedule(dynamic)
        for (int64_t p = 0; p < n_pieces; p++)
            READ(p);
    } else {
        for (int64_t p = 0; p < n_pieces; p++)
            READ(p);
    }

    for (int64_t i = 0, at = 0; i < n_segments; i++) {
        int64_t end = at + pieces_of(counts[i] + tail);
        for (int64_t q = 0; q < n_queries; q++) {
            float *sums = results + at * n_result + q * (width + 2);
            for (int64_t p = at + 1; p < end; p++)
                add(sums, results + p * n_result + q * (width + 2), width);
            float total = sums[width + 1] == 0.0f ? 1.0f : sums[width + 1]; /* no weight at all: 0, as torch has it */
            for (int64_t d = 0; d < width; d++)
                store(output, (i * n_queries + q) * width + d, sums[d] / total, half);
        }
        at = end;
    }
    free(pieces);
    free(scaled);
    return 0;
}
