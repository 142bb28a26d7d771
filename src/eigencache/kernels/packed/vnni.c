/* Attention over packed blocks for CPUs with AVX-512 VNNI: the functions of reference.py, tile by tile on many threads.
   "most" is the largest number of coefficients of a bundle, to which rows of queries and sums are padded. */

#include "vnni.h"

#include <stdlib.h>

#define CASE(R, D, work, ...) \
    case 4 * R + D: work(R, D, __VA_ARGS__); break;
#define BY_ROWS(rows, digits, work, ...) \
    switch (4 * (rows) + (digits)) { \
        CASE(1, 2, work, __VA_ARGS__) CASE(2, 2, work, __VA_ARGS__) CASE(3, 2, work, __VA_ARGS__) CASE(4, 2, work, __VA_ARGS__) \
        CASE(5, 2, work, __VA_ARGS__) CASE(6, 2, work, __VA_ARGS__) CASE(7, 2, work, __VA_ARGS__) CASE(8, 2, work, __VA_ARGS__) \
        CASE(1, 3, work, __VA_ARGS__) CASE(2, 3, work, __VA_ARGS__) CASE(3, 3, work, __VA_ARGS__) CASE(4, 3, work, __VA_ARGS__) \
    }

/* Rows of queries that registers have room for, with D digits. */
static int64_t together(int64_t D) { return D == 3 ? 4 : ROWS; }

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static const uint8_t *block_of(const Codes *c, int64_t batch, int64_t block) {
    return c->data + batch * c->batch_stride + block * c->block_stride;
}

/* Return the largest magnitude, or NaN if any number is NaN. */
static float largest_of(const float *x, int64_t count) {
    __m512 largest = _mm512_setzero_ps();
    __mmask16 none = 0;
    for (int64_t i = 0; i < count; i += 16) {
        __mmask16 there = count - i < 16 ? (1 << (count - i)) - 1 : 0xffff;
        __m512 y = _mm512_abs_ps(_mm512_maskz_loadu_ps(there, x + i));
        none |= _mm512_cmp_ps_mask(y, y, _CMP_UNORD_Q);
        largest = _mm512_max_ps(largest, y);
    }
    return none ? NAN : _mm512_reduce_max_ps(largest);
}

static void digits_of(int D, float x, int8_t *digits, int64_t distance) {
    int32_t whole = (int32_t)lrintf(x);
    for (int i = 0; i < D; i++, whole = (whole + 128) >> 8) digits[i * distance] = (int8_t)whole;
}

/* Convert queries of some rows to digits in the order in which `block_logits` reads them: for every four byte rows and every
   part, row by row and digit by digit, four coefficients in 32 bits. Store the step of every row in `steps`. */
static void ordered_queries(
    const Bundle *b, const float *queries, int64_t most, int rows, int D, int8_t *ordered, float *steps
) {
    Class classes[3];
    classes_of(b, classes);
    for (int r = 0; r < rows; r++) steps[r] = largest_of(queries + r * most, b->all) / largest_number(D);
    for (const Class *c = classes; c < classes + 3; c++)
        for (int64_t k = 0; k < c->rows; k += 4)
            for (int part = 0; part < 8 / c->bits; part++)
                for (int r = 0; r < rows; r++, ordered += 4 * D)
                    for (int j = 0; j < 4; j++) {
                        int there = k + j < c->rows && steps[r] > 0;
                        float q = there ? queries[r * most + c->first + part * c->rows + k + j] / steps[r] : 0;
                        digits_of(D, q, ordered + j, 4);
                    }
}

/* Prefetch a bundle's bytes of one block to the second-level cache; the hardware does not predict such a distance. */
INLINE void prefetch(const Bundle *b, const uint8_t *block) {
    Class classes[3];
    classes_of(b, classes);
    const uint8_t *end = block + classes[2].bytes + BLOCK * classes[2].rows;
    for (const uint8_t *line = block + b->at; line < end; line += 64) _mm_prefetch((const char *)line, _MM_HINT_T1);
}

static void tile_logits(
    int rows, int D, const Codes *codes, const Bundle *b, const uint8_t *block, int64_t blocks, const int8_t *ordered,
    const float *steps, float *out, int64_t distance
) {
    for (int64_t i = 0; i < blocks; i++, block += codes->block_stride, out += BLOCK) {
        if (i + 1 < blocks) prefetch(b, block + codes->block_stride);
        BY_ROWS(rows, D, block_logits, b, block, (const int32_t *)ordered, steps, out, distance)
    }
}

static void tile_sums(
    int rows, int D, const Codes *codes, const Bundle *b, const uint8_t *block, int64_t blocks, const int8_t *weights,
    const float *steps, float *out, int64_t distance
) {
    for (int64_t i = 0; i < blocks; i++) prefetch(b, block + i * codes->block_stride);
    BY_ROWS(rows, D, bundle_sums, b, block, codes->block_stride, blocks, weights, steps, out, distance)
}

/* Return e^x, exact to the last bit but one: 2^n times a polynomial in the rest. */
INLINE __m512 exponential(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-104), x); /* in this order NaN stays NaN */
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.0f / 5040);
    const float factors[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1, 1};
    UNROLL for (int i = 0; i < 7; i++) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(factors[i]));
    return _mm512_scalef_ps(p, n);
}

/* Store the digits of 16 numbers. A different fraction of 1 is added in every lane before rounding down (ordered dithering),
   so that sums of many small numbers are right; rounding to nearest would make all of them 0. */
INLINE void store_digits(int D, __m512 x, int8_t *digits) {
    const __m512 parts = _mm512_set_ps(
        31 / 32.f, 15 / 32.f, 23 / 32.f, 7 / 32.f, 27 / 32.f, 11 / 32.f, 19 / 32.f, 3 / 32.f, 29 / 32.f, 13 / 32.f, 21 / 32.f,
        5 / 32.f, 25 / 32.f, 9 / 32.f, 17 / 32.f, 1 / 32.f
    );
    __m512i whole = _mm512_cvt_roundps_epi32(_mm512_add_ps(x, parts), _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    for (int d = 0; d < D; d++) {
        _mm_storeu_si128((__m128i *)(digits + d * TOKENS), _mm512_cvtepi32_epi8(whole));
        whole = _mm512_srai_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(128)), 8);
    }
}

/* Store the digits [D][TOKENS] of one row of weights, `count` a multiple of 64; return their step. */
static float weight_digits(int D, const float *x, int64_t count, int8_t *digits) {
    float largest = largest_of(x, count), scale = largest > 0 ? largest_number(D) / largest : 0;
    for (int64_t t = 0; t < count; t += 16)
        store_digits(D, _mm512_mul_ps(_mm512_loadu_ps(x + t), _mm512_set1_ps(scale)), digits + t);
    return largest / largest_number(D);
}

typedef struct { /* working space of a thread: digits of weights, logits of a tile, digits of queries, and steps */
    _Alignas(64) int8_t weights[ROWS * DIGITS * TOKENS];
    float logits[2][ROWS * TOKENS], weight_steps[ROWS];
    float *query_steps[2]; /* [rows] */
    int8_t *queries[2]; /* [rows together] */
    int64_t of_row[2]; /* bytes */
} Scratch;

static void free_scratch(Scratch *s) {
    if (s) free(s->query_steps[0]), free(s->query_steps[1]), free(s->queries[0]), free(s->queries[1]);
    free(s);
}

/* Allocate working space for queries of `most` and `other_most` coefficients in the two slots; 0 if out of memory. */
static Scratch *scratch_for(int64_t rows, int64_t most, int64_t other_most) {
    Scratch *s = aligned_alloc(64, sizeof(Scratch));
    if (!s) return 0;
    int enough = 1;
    for (int i = 0; i < 2; i++) {
        s->of_row[i] = DIGITS * ((i ? other_most : most) + 64); /* the last four byte rows of a width may be partly used */
        s->queries[i] = malloc(s->of_row[i] * rows);
        s->query_steps[i] = malloc(sizeof(float) * rows);
        enough &= s->queries[i] && s->query_steps[i];
    }
    if (enough) return s;
    free_scratch(s);
    return 0;
}

/* Convert the queries [rows][most] of one of two slots. */
static void take_queries(Scratch *s, int slot, int D, const Bundle *b, const float *queries, int64_t rows, int64_t most) {
    for (int64_t row = 0; row < rows; row += together(D))
        ordered_queries(
            b, queries + row * most, most, least(together(D), rows - row), D, s->queries[slot] + row * s->of_row[slot],
            s->query_steps[slot] + row
        );
}

/* The functions below run on `threads` threads and return 0, or 1 if out of memory. An item is a bundle of a sequence. */

/* Logits `out` [items][rows][tokens] of `queries` [items][rows][most]. */
int packed_logits(
    const Codes *codes, int64_t items, int64_t bundles, int64_t rows, const float *queries, float *out, int64_t threads
) {
    int failed = 0;
    const int64_t most = codes->most, tokens = codes->blocks * BLOCK, group = together(DIGITS);
#pragma omp parallel for num_threads(threads) reduction(| : failed)
    for (int64_t item = 0; item < items; item++) {
        Scratch *s = scratch_for(rows, most, 0);
        const Bundle *b = codes->bundles + item % bundles;
        if (s) take_queries(s, 0, DIGITS, b, queries + item * rows * most, rows, most);
        for (int64_t at = 0; s && at < codes->blocks; at += TILE)
            for (int64_t row = 0; row < rows; row += group)
                tile_logits(
                    least(group, rows - row), DIGITS, codes, b, block_of(codes, item / bundles, at),
                    least(TILE, codes->blocks - at), s->queries[0] + row * s->of_row[0], s->query_steps[0] + row,
                    out + (item * rows + row) * tokens + at * BLOCK, tokens
                );
        failed |= !s;
        free_scratch(s);
    }
    return failed;
}

/* Weighted sums `out` [items][rows][most], initially zeros, of `weights` [items][rows][tokens]. */
int packed_sums(
    const Codes *codes, int64_t items, int64_t bundles, int64_t rows, const float *weights, float *out, int64_t threads
) {
    int failed = 0;
    const int64_t group = together(DIGITS);
#pragma omp parallel for num_threads(threads) reduction(| : failed)
    for (int64_t item = 0; item < items; item++) {
        Scratch *s = scratch_for(rows, 0, 0);
        for (int64_t at = 0; s && at < codes->blocks; at += TILE)
            for (int64_t row = 0; row < rows; row += group) {
                int64_t some = least(group, rows - row), count = least(TILE, codes->blocks - at);
                for (int64_t r = 0; r < some; r++)
                    s->weight_steps[r] = weight_digits(
                        DIGITS, weights + ((item * rows + row + r) * codes->blocks + at) * BLOCK, count * BLOCK,
                        s->weights + r * DIGITS * TOKENS
                    );
                tile_sums(
                    some, DIGITS, codes, codes->bundles + item % bundles, block_of(codes, item / bundles, at), count,
                    s->weights, s->weight_steps, out + (item * rows + row) * codes->most, codes->most
                );
            }
        failed |= !s;
        free_scratch(s);
    }
    return failed;
}

typedef struct { /* softmax attention over several storages, in their order */
    const Codes *keys, *others; /* [storages] */
    int64_t storages, parts, items, bundles, rows, digits, threads;
    /* [items][rows][most]; with `other_queries`, both logits are added and keys are summed; 0: `others` are summed */
    const float *queries, *other_queries;
    const float *constant, *extra; /* [items][rows], [items][rows][tokens], added to logits; either may be 0 */
    const int32_t *first, *stop; /* [items][rows]: range of visible tokens, or 0 */
    float softcap; /* 0: no cap */
    float *tops, *totals, *sums; /* initially −∞, 0, 0: [parts][items][rows], sums [parts][items][rows][most] */
} Attention;

/* Finish the logits of a tile of one row in place (constants, softcap, visibility); return the largest one. */
static float finished(const Attention *a, int64_t row, int64_t token, int64_t tokens, float *x, const float *other, int64_t count) {
    const float *extra = a->extra ? a->extra + row * tokens + token : 0;
    const __m512 cap = _mm512_set1_ps(a->softcap), constant = _mm512_set1_ps(a->constant ? a->constant[row] : 0);
    const __m512i first = _mm512_set1_epi32(a->first ? a->first[row] - token : 0);
    const __m512i stop = _mm512_set1_epi32(a->first ? a->stop[row] - token : INT32_MAX);
    __m512 most = _mm512_set1_ps(-INFINITY);
    __m512i at = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (int64_t t = 0; t < count; t += 16, at = _mm512_add_epi32(at, _mm512_set1_epi32(16))) {
        __m512 y = _mm512_add_ps(_mm512_loadu_ps(x + t), constant);
        if (other) y = _mm512_add_ps(y, _mm512_loadu_ps(other + t));
        if (extra) y = _mm512_add_ps(y, _mm512_loadu_ps(extra + t));
        if (a->softcap) { /* cap tanh(y / cap) */
            __m512 e = exponential(_mm512_div_ps(_mm512_add_ps(y, y), cap));
            y = _mm512_sub_ps(cap, _mm512_div_ps(_mm512_add_ps(cap, cap), _mm512_add_ps(e, _mm512_set1_ps(1))));
        }
        __mmask16 seen = _mm512_cmple_epi32_mask(first, at) & _mm512_cmplt_epi32_mask(at, stop);
        y = _mm512_mask_blend_ps(seen, _mm512_set1_ps(-INFINITY), y);
        _mm512_storeu_ps(x + t, y);
        most = _mm512_max_ps(most, y);
    }
    return _mm512_reduce_max_ps(most);
}

/* Store the digits [D][TOKENS] of the softmax weights of one row's logits; return their step. Earlier sums are rescaled. */
static float tile_weights(
    int D, const float *x, int64_t count, float largest, float *top, float *total, float *sums, int64_t most, int8_t *digits
) {
    if (largest > *top) {
        float shrink = expf(*top - largest);
        for (int64_t i = 0; i < most; i++) sums[i] *= shrink;
        *total *= shrink;
        *top = largest;
    }
    float zero = *top == -INFINITY ? -FLT_MAX : *top; /* no token is visible yet: weights of zero */
    float step = expf(largest - zero) / largest_number(D), scale = step > FLT_MIN ? 1 / step : 0;
    __m512 sum = _mm512_setzero_ps();
    for (int64_t t = 0; t < count; t += 16) {
        __m512 y = exponential(_mm512_sub_ps(_mm512_loadu_ps(x + t), _mm512_set1_ps(zero)));
        sum = _mm512_add_ps(sum, y);
        store_digits(D, _mm512_mul_ps(y, _mm512_set1_ps(scale)), digits + t);
    }
    *total += _mm512_reduce_add_ps(sum);
    return step;
}

static int sees(const Attention *a, int64_t row, int64_t rows, int64_t token, int64_t stop) {
    if (!a->first) return 1;
    for (int64_t r = row; r < row + rows; r++)
        if (a->first[r] < stop && a->stop[r] > token) return 1;
    return 0;
}

/* Attend to one part of all storages, for one item. */
static void attend_part(const Attention *a, Scratch *s, int64_t item, int64_t part, int64_t tokens) {
    const int64_t bundle = item % a->bundles, batch = item / a->bundles, rows = a->rows, D = a->digits, group = together(D);
    const int64_t most = a->keys->most, other_most = a->others->most, summed = a->other_queries ? most : other_most;
    const Bundle *b = a->keys->bundles + bundle, *ob = a->others->bundles + bundle;
    take_queries(s, 0, D, b, a->queries + item * rows * most, rows, most);
    if (a->other_queries) take_queries(s, 1, D, ob, a->other_queries + item * rows * other_most, rows, other_most);
    int64_t before = 0;
    for (int64_t i = 0; i < a->storages; before += a->keys[i].blocks, i++) {
        const Codes *keys = a->keys + i, *others = a->others + i;
        int64_t to = keys->blocks * (part + 1) / a->parts;
        for (int64_t at = keys->blocks * part / a->parts; at < to; at += TILE) {
            int64_t blocks = least(TILE, to - at), count = blocks * BLOCK, token = (before + at) * BLOCK;
            const uint8_t *key = block_of(keys, batch, at), *other = block_of(others, batch, at);
            const Codes *weighed = a->other_queries ? keys : others;
            for (int64_t row = 0; row < rows; row += group) {
                int64_t some = least(group, rows - row), of_item = item * rows + row, of_part = part * a->items * rows + of_item;
                if (!sees(a, of_item, some, token, token + count)) continue;
                for (int slot = 0; slot < (a->other_queries ? 2 : 1); slot++)
                    tile_logits(
                        some, D, slot ? others : keys, slot ? ob : b, slot ? other : key, blocks,
                        s->queries[slot] + row * s->of_row[slot], s->query_steps[slot] + row, s->logits[slot], TOKENS
                    );
                for (int64_t r = 0; r < some; r++) {
                    float *x = s->logits[0] + r * TOKENS, *y = a->other_queries ? s->logits[1] + r * TOKENS : 0;
                    float largest = finished(a, of_item + r, token, tokens, x, y, count);
                    s->weight_steps[r] = tile_weights(
                        D, x, count, largest, a->tops + of_part + r, a->totals + of_part + r, a->sums + (of_part + r) * summed,
                        summed, s->weights + r * D * TOKENS
                    );
                }
                tile_sums(
                    some, D, weighed, weighed->bundles + bundle, block_of(weighed, batch, at), blocks, s->weights,
                    s->weight_steps, a->sums + of_part * summed, summed
                );
            }
        }
    }
}

int packed_attention(const Attention *a) {
    int failed = 0;
    int64_t tokens = 0;
    for (int64_t i = 0; i < a->storages; i++) tokens += a->keys[i].blocks * BLOCK;
#pragma omp parallel for num_threads(a->threads) reduction(| : failed)
    for (int64_t task = 0; task < a->parts * a->items; task++) {
        Scratch *s = scratch_for(a->rows, a->keys->most, a->others->most);
        if (s) attend_part(a, s, task % a->items, task / a->items, tokens);
        failed |= !s;
        free_scratch(s);
    }
    return failed;
}
