/* Attention inside packed codes for CPUs with AVX-512 VNNI: kernels/reference.py, with products of 8-bit integers.

   Codes stay bytes. Queries and weights become fixed-point numbers of three signed 8-bit digits, 2^-23 of the largest
   one of a row (a tile, for weights), so results are as exact as in 32-bit floats. vpdpbusd multiplies 64 pairs at once:
   for logits four coefficients of 16 tokens, brought beside each other in registers; for sums 64 tokens of a coefficient. */

#include <float.h>
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>

enum { BLOCK = 64, TILE = 16, TOKENS = TILE * BLOCK, DIGITS = 3, ROWS = 4 };
#define LARGEST 8355000.0f /* of three digits */
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")

typedef struct { /* a bundle: where its bytes begin in a block, and coefficients of 8, of 8 or 4, and of any bits */
    int64_t at, eight, four, all;
} Bundle;

typedef struct { /* blocks of one storage: `data`[batch][blocks] at these distances in bytes */
    const uint8_t *data;
    int64_t batch_stride, block_stride;
    const Bundle *bundles;
    int64_t most; /* coefficients of any bundle */
} Codes;

typedef struct { /* coefficients of one width in a bundle: byte rows from `bytes` on, coefficients from `first` on */
    int64_t bytes, first, rows;
    int bits;
} Class;

INLINE void classes_of(const Bundle *b, Class found[3]) {
    int64_t eight = b->eight, four = b->four - b->eight, two = b->all - b->four;
    found[0] = (Class){b->at, 0, eight, 8};
    found[1] = (Class){b->at + BLOCK * eight, eight, four / 2, 4};
    found[2] = (Class){b->at + BLOCK * (eight + four / 2), eight + four, two / 4, 2};
}

INLINE __m512i part_of(__m512i bytes, int bits, int part) {
    if (bits == 8) return bytes;
    return _mm512_and_si512(_mm512_srli_epi16(bytes, bits * part), _mm512_set1_epi8((1 << bits) - 1));
}

/* sum += 64 products, four neighbours each. Written out, as compilers copy sums back and forth around the intrinsic. */
INLINE void add_products(__m512i *sum, __m512i codes, const int8_t *digits) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(*sum) : "v"(codes), "m"(*(const __m512i_u *)digits));
}

/* The same with four digits for all. */
INLINE void add_products_of_four(__m512i *sum, __m512i codes, const int32_t *digits) {
    __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(*sum) : "v"(codes), "m"(*digits));
}

INLINE __m512 joined(const __m512i digits[DIGITS]) {
    __m512 low = _mm512_fmadd_ps(_mm512_cvtepi32_ps(digits[1]), _mm512_set1_ps(256), _mm512_cvtepi32_ps(digits[0]));
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(digits[2]), _mm512_set1_ps(65536), low);
}

/* The largest magnitude; NaN where there is one. */
static float largest_of(const float *x, int64_t count) {
    float largest = 0;
    for (int64_t i = 0; i < count; i++)
        if (!(fabsf(x[i]) <= largest)) largest = fabsf(x[i]);
    for (int64_t i = 0; i < count; i++)
        if (x[i] != x[i]) return NAN;
    return largest;
}

static void digits_of(float x, int8_t *digits, int64_t distance) {
    int32_t whole = (int32_t)lrintf(x);
    for (int i = 0; i < DIGITS; i++, whole = (whole + 128) >> 8) digits[i * distance] = (int8_t)whole;
}

/* Queries of some rows in the order in which `block_logits` wants them: per four byte rows and part, row by row, digit by
   digit, four coefficients in 32 bits. `steps`: of every row. */
static void ordered_queries(const Bundle *b, const float *queries, int64_t most, int rows, int8_t *ordered, float *steps) {
    Class classes[3];
    classes_of(b, classes);
    for (int r = 0; r < rows; r++) {
        float largest = largest_of(queries + r * most, b->all);
        steps[r] = largest / LARGEST;
    }
    for (const Class *c = classes; c < classes + 3; c++)
        for (int64_t k = 0; k < c->rows; k += 4)
            for (int part = 0; part < 8 / c->bits; part++)
                for (int r = 0; r < rows; r++, ordered += 4 * DIGITS)
                    for (int j = 0; j < 4; j++) {
                        int there = k + j < c->rows && steps[r] > 0;
                        float q = there ? queries[r * most + c->first + part * c->rows + k + j] / steps[r] : 0;
                        digits_of(q, ordered + j, 4);
                    }
}

INLINE void class_logits(
    const int R, const int bits, const int half, const uint8_t *bytes, int64_t rows, const int32_t **ordered,
    __m512i sums[][2][DIGITS]
) {
    for (int64_t k = 0; k < rows; k += 4, bytes += 4 * BLOCK) {
        __m512i z[4], x[2];
        UNROLL for (int j = 0; j < 4; j++) z[j] = _mm512_loadu_si512(bytes + (k + j < rows ? j * BLOCK : 0));
        if (half) {
            z[0] = _mm512_unpackhi_epi8(z[0], z[1]), z[2] = _mm512_unpackhi_epi8(z[2], z[3]);
        } else {
            z[0] = _mm512_unpacklo_epi8(z[0], z[1]), z[2] = _mm512_unpacklo_epi8(z[2], z[3]);
        }
        x[0] = _mm512_unpacklo_epi16(z[0], z[2]), x[1] = _mm512_unpackhi_epi16(z[0], z[2]);
        UNROLL for (int part = 0; part < 8 / bits; part++, *ordered += R * DIGITS) {
            __m512i u[2] = {part_of(x[0], bits, part), part_of(x[1], bits, part)};
            UNROLL for (int r = 0; r < R; r++)
                UNROLL for (int d = 0; d < DIGITS; d++) {
                    add_products_of_four(&sums[r][0][d], u[0], *ordered + r * DIGITS + d);
                    add_products_of_four(&sums[r][1][d], u[1], *ordered + r * DIGITS + d);
                }
        }
    }
}

/* Logits of 64 tokens, rows at `distance` in `out`. */
INLINE void block_logits(
    const int R, const Bundle *b, const uint8_t *block, const int32_t *queries, const float *steps, float *out, int64_t distance
) {
    Class classes[3];
    classes_of(b, classes);
    UNROLL for (int half = 0; half < 2; half++) {
        __m512i sums[ROWS][2][DIGITS];
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int d = 0; d < DIGITS; d++) sums[r][0][d] = sums[r][1][d] = _mm512_setzero_si512();
        const int32_t *ordered = queries;
        class_logits(R, 8, half, block + classes[0].bytes, classes[0].rows, &ordered, sums);
        class_logits(R, 4, half, block + classes[1].bytes, classes[1].rows, &ordered, sums);
        class_logits(R, 2, half, block + classes[2].bytes, classes[2].rows, &ordered, sums);
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int side = 0; side < 2; side++) { /* four neighbours in every 128 bits */
                __m512 x = _mm512_mul_ps(joined(sums[r][side]), _mm512_set1_ps(steps[r]));
                float *to = out + r * distance + 8 * half + 4 * side;
                _mm_storeu_ps(to, _mm512_extractf32x4_ps(x, 0));
                _mm_storeu_ps(to + 16, _mm512_extractf32x4_ps(x, 1));
                _mm_storeu_ps(to + 32, _mm512_extractf32x4_ps(x, 2));
                _mm_storeu_ps(to + 48, _mm512_extractf32x4_ps(x, 3));
            }
    }
}

#define BY_ROWS(rows, work, ...) \
    switch (rows) { \
        case 1: work(1, __VA_ARGS__); break; \
        case 2: work(2, __VA_ARGS__); break; \
        case 3: work(3, __VA_ARGS__); break; \
        default: work(4, __VA_ARGS__); \
    }

/* A bundle's bytes of one block, on their way to the second-level cache: what follows lies too far off to be foreseen. */
INLINE void prefetch(const Bundle *b, const uint8_t *block) {
    Class classes[3];
    classes_of(b, classes);
    const uint8_t *end = block + classes[2].bytes + BLOCK * classes[2].rows;
    for (const uint8_t *line = block + b->at; line < end; line += 64) _mm_prefetch((const char *)line, _MM_HINT_T1);
}

static void tile_logits(
    int rows, const Bundle *b, const uint8_t *block, int64_t stride, int64_t blocks, const int8_t *ordered, const float *steps,
    float *out, int64_t distance
) {
    for (int64_t i = 0; i < blocks; i++, block += stride, out += BLOCK) {
        if (i + 1 < blocks) prefetch(b, block + stride);
        BY_ROWS(rows, block_logits, b, block, (const int32_t *)ordered, steps, out, distance)
    }
}

/* Two coefficients' sums over a tile: of byte rows at x and y, parts of them, with the digits of weights. */
INLINE void pair_sums(
    const int R, const int bits, const uint8_t *x, int x_part, const uint8_t *y, int y_part, int64_t stride, int64_t blocks,
    const int8_t *weights, const float *steps, float *x_out, float *y_out, int64_t distance
) {
    __m512i sums[2][ROWS][DIGITS];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int d = 0; d < DIGITS; d++) sums[0][r][d] = sums[1][r][d] = _mm512_setzero_si512();
    for (int64_t i = 0; i < blocks; i++, x += stride, y += stride, weights += BLOCK) {
        __m512i u[2] = {part_of(_mm512_loadu_si512(x), bits, x_part), part_of(_mm512_loadu_si512(y), bits, y_part)};
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int d = 0; d < DIGITS; d++) {
                add_products(&sums[0][r][d], u[0], weights + (r * DIGITS + d) * TOKENS);
                add_products(&sums[1][r][d], u[1], weights + (r * DIGITS + d) * TOKENS);
            }
    }
    UNROLL for (int r = 0; r < R; r++) {
        x_out[r * distance] += steps[r] * _mm512_reduce_add_ps(joined(sums[0][r]));
        y_out[r * distance] += steps[r] * _mm512_reduce_add_ps(joined(sums[1][r]));
    }
}

INLINE void class_sums(
    const int R, const int bits, const Class *c, const uint8_t *block, int64_t stride, int64_t blocks, const int8_t *weights,
    const float *steps, float *out, int64_t distance
) {
    const uint8_t *row = block + c->bytes;
    float *to = out + c->first;
    if (bits == 8)
        for (int64_t k = 0; k < c->rows; k += 2, row += 2 * BLOCK, to += 2)
            pair_sums(R, 8, row, 0, row + BLOCK, 0, stride, blocks, weights, steps, to, to + 1, distance);
    else
        for (int64_t k = 0; k < c->rows; k++, row += BLOCK, to++)
            UNROLL for (int part = 0; part < 8 / bits; part += 2)
                pair_sums(
                    R, bits, row, part, row, part + 1, stride, blocks, weights, steps, to + part * c->rows,
                    to + (part + 1) * c->rows, distance
                );
}

INLINE void bundle_sums(
    const int R, const Bundle *b, const uint8_t *block, int64_t stride, int64_t blocks, const int8_t *weights,
    const float *steps, float *out, int64_t distance
) {
    Class classes[3];
    classes_of(b, classes);
    for (int64_t i = 0; i < blocks; i++) prefetch(b, block + i * stride);
    class_sums(R, 8, classes, block, stride, blocks, weights, steps, out, distance);
    class_sums(R, 4, classes + 1, block, stride, blocks, weights, steps, out, distance);
    class_sums(R, 2, classes + 2, block, stride, blocks, weights, steps, out, distance);
}

static void tile_sums(
    int rows, const Bundle *b, const uint8_t *block, int64_t stride, int64_t blocks, const int8_t *weights, const float *steps,
    float *out, int64_t distance
) {
    BY_ROWS(rows, bundle_sums, b, block, stride, blocks, weights, steps, out, distance)
}

/* Digits [DIGITS][TOKENS] of one row's weights x, a multiple of 64 of them, the largest of which is given; their step. */
static float weight_digits(const float *x, int64_t count, float largest, int8_t *digits) {
    float scale = largest > 0 ? LARGEST / largest : 0;
    const __m512i half = _mm512_set1_epi32(128);
    for (int64_t t = 0; t < count; t += 16) {
        __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + t), _mm512_set1_ps(scale)));
        for (int d = 0; d < DIGITS; d++) {
            _mm_storeu_si128((__m128i *)(digits + d * TOKENS + t), _mm512_cvtepi32_epi8(whole));
            whole = _mm512_srai_epi32(_mm512_add_epi32(whole, half), 8);
        }
    }
    return largest / LARGEST;
}

/* e^x of x <= 0 to the last bits but one: 2^n times a polynomial in the rest. */
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

/* In place: e^(x − most) of finite or −∞ x; their sum. */
static float exponentials(float *x, int64_t count, float most) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t t = 0; t < count; t += 16) {
        __m512 y = exponential(_mm512_sub_ps(_mm512_loadu_ps(x + t), _mm512_set1_ps(most)));
        _mm512_storeu_ps(x + t, y);
        sum = _mm512_add_ps(sum, y);
    }
    return _mm512_reduce_add_ps(sum);
}

static float most_of(const float *x, int64_t count) {
    __m512 most = _mm512_set1_ps(-INFINITY);
    for (int64_t t = 0; t < count; t += 16) most = _mm512_max_ps(most, _mm512_loadu_ps(x + t));
    return _mm512_reduce_max_ps(most);
}

typedef struct { /* what a thread works with: weights' digits, logits of a tile, queries' digits, and steps */
    _Alignas(64) int8_t weights[ROWS * DIGITS * TOKENS];
    float logits[ROWS * TOKENS], query_steps[ROWS], weight_steps[ROWS];
    int8_t *queries;
} Scratch;

static Scratch *scratch_for(int64_t most) {
    Scratch *s = aligned_alloc(64, sizeof(Scratch));
    int8_t *queries = s ? malloc(ROWS * DIGITS * (most + 64)) : 0; /* the last four byte rows of a width may be half full */
    if (!queries) {
        free(s);
        return 0;
    }
    s->queries = queries;
    return s;
}

static void free_scratch(Scratch *s) {
    if (s) free(s->queries);
    free(s);
}

static const uint8_t *block_of(const Codes *c, int64_t batch, int64_t block) {
    return c->data + batch * c->batch_stride + block * c->block_stride;
}

/* The three functions below work on `threads` threads and return 0, or 1 where there is no memory. Items are bundles of
   sequences, one after the other. */

/* `queries` [items][rows][most], `out` [items][rows][tokens]. */
int packed_logits(
    const Codes *codes, int64_t blocks, int64_t items, int64_t bundles, int64_t rows, const float *queries, float *out,
    int64_t threads
) {
    int failed = 0;
#pragma omp parallel for num_threads(threads) reduction(| : failed)
    for (int64_t item = 0; item < items; item++) {
        Scratch *s = scratch_for(codes->most);
        const Bundle *b = codes->bundles + item % bundles;
        for (int64_t row = 0; s && row < rows; row += ROWS) {
            int some = rows - row < ROWS ? rows - row : ROWS;
            ordered_queries(b, queries + (item * rows + row) * codes->most, codes->most, some, s->queries, s->query_steps);
            tile_logits(
                some, b, block_of(codes, item / bundles, 0), codes->block_stride, blocks, s->queries, s->query_steps,
                out + (item * rows + row) * blocks * BLOCK, blocks * BLOCK
            );
        }
        failed |= !s;
        free_scratch(s);
    }
    return failed;
}

/* `weights` [items][rows][tokens], `out` [items][rows][most], zeros before. */
int packed_sums(
    const Codes *codes, int64_t blocks, int64_t items, int64_t bundles, int64_t rows, const float *weights, float *out,
    int64_t threads
) {
    int failed = 0;
#pragma omp parallel for num_threads(threads) reduction(| : failed)
    for (int64_t item = 0; item < items; item++) {
        Scratch *s = scratch_for(codes->most);
        for (int64_t at = 0; s && at < blocks; at += TILE)
            for (int64_t row = 0; row < rows; row += ROWS) {
                int some = rows - row < ROWS ? rows - row : ROWS;
                int64_t count = blocks - at < TILE ? blocks - at : TILE;
                for (int r = 0; r < some; r++) {
                    const float *x = weights + ((item * rows + row + r) * blocks + at) * BLOCK;
                    float largest = largest_of(x, count * BLOCK);
                    s->weight_steps[r] = weight_digits(x, count * BLOCK, largest, s->weights + r * DIGITS * TOKENS);
                }
                tile_sums(
                    some, codes->bundles + item % bundles, block_of(codes, item / bundles, at), codes->block_stride, count,
                    s->weights, s->weight_steps, out + (item * rows + row) * codes->most, codes->most
                );
            }
        failed |= !s;
        free_scratch(s);
    }
    return failed;
}

typedef struct { /* of one row: the largest logit so far, sum of weights and weighed sums [most], relative to it */
    float *top, *total, *sums;
} State;

/* Logits of a tile in `x` become weights in place, then digits; what was there before shrinks. */
static float tile_weights(float *x, int64_t count, State state, int64_t most, int8_t *digits) {
    float largest = most_of(x, count);
    if (largest > *state.top) {
        float shrink = expf(*state.top - largest);
        for (int64_t i = 0; i < most; i++) state.sums[i] *= shrink;
        *state.total *= shrink;
        *state.top = largest;
    }
    float top = *state.top == -INFINITY ? -FLT_MAX : *state.top; /* nothing is seen yet: weights of zero */
    *state.total += exponentials(x, count, top);
    return weight_digits(x, count, expf(largest - top), digits);
}

/* Softmax of logits and of `extra` [items][rows] at a distance, if any, and the weighed sums, tile by tile: nothing of the
   length of the past is made. A storage is cut into `parts`; `tops` (−∞ before) and `totals` (0) [parts][items][rows] and
   `sums` (0) [parts][items][rows][most] take in one storage with every call. */
int packed_attention(
    const Codes *keys, const Codes *values, int64_t blocks, int64_t parts, int64_t items, int64_t bundles, int64_t rows,
    const float *queries, const float *extra, int64_t extra_distance, float *tops, float *totals, float *sums, int64_t threads
) {
    int failed = 0;
#pragma omp parallel for num_threads(threads) reduction(| : failed)
    for (int64_t task = 0; task < parts * items; task++) {
        Scratch *s = scratch_for(keys->most);
        int64_t item = task % items, part = task / items, from = blocks * part / parts, to = blocks * (part + 1) / parts;
        const Bundle *kb = keys->bundles + item % bundles, *vb = values->bundles + item % bundles;
        for (int64_t row = 0; s && row < rows; row += ROWS) {
            int some = rows - row < ROWS ? rows - row : ROWS;
            int64_t of_item = item * rows + row, of_task = task * rows + row;
            ordered_queries(kb, queries + of_item * keys->most, keys->most, some, s->queries, s->query_steps);
            for (int64_t at = from; at < to; at += TILE) {
                int64_t count = to - at < TILE ? to - at : TILE;
                tile_logits(
                    some, kb, block_of(keys, item / bundles, at), keys->block_stride, count, s->queries, s->query_steps,
                    s->logits, TOKENS
                );
                for (int r = 0; r < some; r++) {
                    float *x = s->logits + r * TOKENS;
                    const float *more = extra + (of_item + r) * extra_distance + at * BLOCK;
                    for (int64_t t = 0; extra && t < count * BLOCK; t++) x[t] += more[t];
                    State state = {tops + of_task + r, totals + of_task + r, sums + (of_task + r) * values->most};
                    s->weight_steps[r] = tile_weights(x, count * BLOCK, state, values->most, s->weights + r * DIGITS * TOKENS);
                }
                tile_sums(
                    some, vb, block_of(values, item / bundles, at), values->block_stride, count, s->weights, s->weight_steps,
                    sums + of_task * values->most, values->most
                );
            }
        }
        failed |= !s;
        free_scratch(s);
    }
    return failed;
}
