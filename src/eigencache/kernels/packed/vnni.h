/* Products of packed integers with queries and with weights, for vnni.c.

   Packed integers stay bytes. Queries and weights become fixed-point numbers of D signed 8-bit digits. Their step, relative
   to the largest number of a row (for weights: of a row in a tile), is 2^-23 for three digits, as exact as float32, and 2^-15
   for two, which is more exact than a model in 16 bits. vpdpbusd multiplies 64 pairs at once: for logits, four coefficients
   of 16 tokens, which are interleaved in registers; for sums, 64 tokens of one coefficient. R (rows), D and bits are
   compile-time constants in every instance of these functions. */

#include <float.h>
#include <immintrin.h>
#include <math.h>
#include <stdint.h>

enum { BLOCK = 64, TILE = 16, TOKENS = TILE * BLOCK, DIGITS = 3, ROWS = 8, SUMS = 12 }; /* SUMS: most R · D of one pass */
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")

typedef struct { /* a bundle: first byte in a block, and numbers of coefficients of 8, of 8 or 4, and of any bits */
    int64_t at, eight, four, all;
} Bundle;

typedef struct { /* blocks of one storage: `data`[batch][blocks] with strides in bytes */
    const uint8_t *data;
    int64_t batch_stride, block_stride, blocks;
    const Bundle *bundles;
    int64_t most; /* coefficients of any bundle */
} Codes;

typedef struct { /* coefficients of one width in a bundle: first byte, first coefficient, byte rows */
    int64_t bytes, first, rows;
    int bits;
} Class;

INLINE void classes_of(const Bundle *b, Class found[3]) {
    int64_t eight = b->eight, four = b->four - b->eight, two = b->all - b->four;
    found[0] = (Class){b->at, 0, eight, 8};
    found[1] = (Class){b->at + BLOCK * eight, eight, four / 2, 4};
    found[2] = (Class){b->at + BLOCK * (eight + four / 2), eight + four, two / 4, 2};
}

INLINE float largest_number(const int D) { return D == 3 ? 8355000.0f : 32600.0f; }

INLINE __m512i part_of(__m512i bytes, int bits, int part) {
    if (bits == 8) return bytes;
    return _mm512_and_si512(_mm512_srli_epi16(bytes, bits * part), _mm512_set1_epi8((1 << bits) - 1));
}

/* sum += 64 products, of four neighbors per lane. Assembly, as compilers copy sums needlessly around the intrinsic. */
INLINE void add_products(__m512i *sum, __m512i codes, __m512i digits) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(*sum) : "v"(codes), "v"(digits));
}

/* As add_products, with the same four digits for all lanes. */
INLINE void add_products_of_four(__m512i *sum, __m512i codes, const int32_t *digits) {
    __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(*sum) : "v"(codes), "m"(*digits));
}

INLINE __m512 joined(const int D, const __m512i *digits) {
    __m512 sum = _mm512_cvtepi32_ps(digits[D - 1]);
    UNROLL for (int d = D - 2; d >= 0; d--) sum = _mm512_fmadd_ps(sum, _mm512_set1_ps(256), _mm512_cvtepi32_ps(digits[d]));
    return sum;
}

/* Add products of coefficients of a width and digits of queries, for 16 tokens (`side` 0 or 1) or 32 (−1) of one half. */
INLINE void class_logits(
    const int R, const int D, const int bits, const int half, const int side, const uint8_t *bytes, int64_t rows,
    const int32_t **ordered, __m512i sums[][2][DIGITS]
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
        UNROLL for (int part = 0; part < 8 / bits; part++, *ordered += R * D) {
            UNROLL for (int s = 0; s < 2; s++) {
                if (side >= 0 && s != side) continue;
                __m512i u = part_of(x[s], bits, part);
                UNROLL for (int r = 0; r < R; r++)
                    UNROLL for (int d = 0; d < D; d++) add_products_of_four(&sums[r][s][d], u, *ordered + r * D + d);
            }
        }
    }
}

INLINE void some_logits(
    const int R, const int D, const int half, const int side, const Class classes[3], const uint8_t *block,
    const int32_t *queries, const float *steps, float *out, int64_t distance
) {
    __m512i sums[ROWS][2][DIGITS];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int d = 0; d < D; d++) sums[r][0][d] = sums[r][1][d] = _mm512_setzero_si512();
    class_logits(R, D, 8, half, side, block + classes[0].bytes, classes[0].rows, &queries, sums);
    class_logits(R, D, 4, half, side, block + classes[1].bytes, classes[1].rows, &queries, sums);
    class_logits(R, D, 2, half, side, block + classes[2].bytes, classes[2].rows, &queries, sums);
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int s = 0; s < 2; s++) { /* four neighbors in every 128 bits */
            if (side >= 0 && s != side) continue;
            __m512 x = _mm512_mul_ps(joined(D, sums[r][s]), _mm512_set1_ps(steps[r]));
            float *to = out + r * distance + 8 * half + 4 * s;
            _mm_storeu_ps(to, _mm512_extractf32x4_ps(x, 0));
            _mm_storeu_ps(to + 16, _mm512_extractf32x4_ps(x, 1));
            _mm_storeu_ps(to + 32, _mm512_extractf32x4_ps(x, 2));
            _mm_storeu_ps(to + 48, _mm512_extractf32x4_ps(x, 3));
        }
}

/* Store the logits of 64 tokens; rows are `distance` apart in `out`. */
INLINE void block_logits(
    const int R, const int D, const Bundle *b, const uint8_t *block, const int32_t *queries, const float *steps, float *out,
    int64_t distance
) {
    Class classes[3];
    classes_of(b, classes);
    UNROLL for (int half = 0; half < 2; half++) {
        if (R * D <= SUMS) {
            some_logits(R, D, half, -1, classes, block, queries, steps, out, distance);
        } else {
            some_logits(R, D, half, 0, classes, block, queries, steps, out, distance);
            some_logits(R, D, half, 1, classes, block, queries, steps, out, distance);
        }
    }
}

/* Add the sums over a tile of N coefficients, which are parts of the byte rows at x, to `out`. */
INLINE void some_sums(
    const int R, const int D, const int N, const int bits, const uint8_t *const *x, const int *part, int64_t stride,
    int64_t blocks, const int8_t *weights, const float *steps, float *const *out, int64_t distance
) {
    __m512i sums[2][ROWS][DIGITS];
    UNROLL for (int n = 0; n < N; n++)
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int d = 0; d < D; d++) sums[n][r][d] = _mm512_setzero_si512();
    for (int64_t i = 0; i < blocks; i++, weights += BLOCK) {
        __m512i u[2];
        UNROLL for (int n = 0; n < N; n++) u[n] = part_of(_mm512_loadu_si512(x[n] + i * stride), bits, part[n]);
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int d = 0; d < D; d++) {
                __m512i digits = _mm512_loadu_si512(weights + (r * D + d) * TOKENS);
                UNROLL for (int n = 0; n < N; n++) add_products(&sums[n][r][d], u[n], digits);
            }
    }
    UNROLL for (int n = 0; n < N; n++)
        UNROLL for (int r = 0; r < R; r++) out[n][r * distance] += steps[r] * _mm512_reduce_add_ps(joined(D, sums[n][r]));
}

/* Add the sums of two coefficients, one after the other where registers have no room for both. */
INLINE void pair_sums(
    const int R, const int D, const int bits, const uint8_t *const *x, const int *part, int64_t stride, int64_t blocks,
    const int8_t *weights, const float *steps, float *const *out, int64_t distance
) {
    if (R * D <= SUMS) {
        some_sums(R, D, 2, bits, x, part, stride, blocks, weights, steps, out, distance);
    } else {
        some_sums(R, D, 1, bits, x, part, stride, blocks, weights, steps, out, distance);
        some_sums(R, D, 1, bits, x + 1, part + 1, stride, blocks, weights, steps, out + 1, distance);
    }
}

INLINE void class_sums(
    const int R, const int D, const int bits, const Class *c, const uint8_t *block, int64_t stride, int64_t blocks,
    const int8_t *weights, const float *steps, float *out, int64_t distance
) {
    const uint8_t *row = block + c->bytes;
    float *to = out + c->first;
    const int64_t rows = c->rows;
    if (bits == 8)
        for (int64_t k = 0; k < rows; k += 2, row += 2 * BLOCK, to += 2) {
            const uint8_t *const x[2] = {row, row + BLOCK};
            float *const both[2] = {to, to + 1};
            const int parts[2] = {0, 0};
            pair_sums(R, D, 8, x, parts, stride, blocks, weights, steps, both, distance);
        }
    else
        for (int64_t k = 0; k < rows; k++, row += BLOCK, to++)
            UNROLL for (int part = 0; part < 8 / bits; part += 2) {
                const uint8_t *const x[2] = {row, row};
                float *const both[2] = {to + part * rows, to + (part + 1) * rows};
                const int parts[2] = {part, part + 1};
                pair_sums(R, D, bits, x, parts, stride, blocks, weights, steps, both, distance);
            }
}

/* Add the sums over the blocks of a tile to `out`; rows are `distance` apart. */
INLINE void bundle_sums(
    const int R, const int D, const Bundle *b, const uint8_t *block, int64_t stride, int64_t blocks, const int8_t *weights,
    const float *steps, float *out, int64_t distance
) {
    Class classes[3];
    classes_of(b, classes);
    class_sums(R, D, 8, classes, block, stride, blocks, weights, steps, out, distance);
    class_sums(R, D, 4, classes + 1, block, stride, blocks, weights, steps, out, distance);
    class_sums(R, D, 2, classes + 2, block, stride, blocks, weights, steps, out, distance);
}
