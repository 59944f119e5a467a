/* Vectors for loops over rows and blocks, which do not depend on each other: LANES of them are computed side by side in
   one vector. Everything is f32; of rows it lies columns first, [columns, rows]. moequant.rounding and moequant.formats
   have a function of the same name for each of the exported ones, which computes the same with torch and says what it is
   for. */

#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX__)
enum { LANES = 8 };
#else
enum { LANES = 4 };
#endif
enum { STEP = 8, EIGHT = 8 };

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));

static inline vec all(float x) { return (vec){0} + x; }

static inline ivec all_int(int32_t x) { return (ivec){0} + x; }

/* Of fewer rows than LANES the rest is 0. A copy of a size that is known is one instruction. */
static inline vec load(const float *from, int64_t lanes) {
    vec x = {0};
    if (lanes >= LANES) {
        memcpy(&x, from, sizeof x);
    } else {
        memcpy(&x, from, sizeof *from * lanes);
    }
    return x;
}

static inline void store(float *to, vec x, int64_t lanes) {
    if (lanes >= LANES) {
        memcpy(to, &x, sizeof x);
    } else {
        memcpy(to, &x, sizeof *to * lanes);
    }
}

#if defined(__AVX__)
/* By name, because the system's header takes longer to read than all of this to compile. */
static inline vec pick(ivec which, vec yes, vec no) { return __builtin_ia32_blendvps256(no, yes, (vec)which); }

static inline vec smaller(vec x, vec y) { return __builtin_ia32_minps256(x, y); } /* y where one is no number */

static inline vec larger(vec x, vec y) { return __builtin_ia32_maxps256(x, y); }
#else
static inline vec pick(ivec which, vec yes, vec no) { return (vec)((which & (ivec)yes) | (~which & (ivec)no)); }

static inline vec smaller(vec x, vec y) { return pick(x < y, x, y); } /* y where one is no number */

static inline vec larger(vec x, vec y) { return pick(x > y, x, y); }
#endif

static inline ivec pick_int(ivec which, ivec yes, ivec no) { return (which & yes) | (~which & no); }

static inline vec absolute(vec x) { return (vec)((ivec)x & 0x7fffffff); }

static inline vec clamp(vec x, float low, float high) { return smaller(larger(x, all(low)), all(high)); } /* no number: low */

static inline vec whole(vec x) { /* the nearest integer, of two the even one, of numbers below 2²² */
    const float even = 12582912.0f; /* 1.5 · 2²³: what is added to it is rounded to an integer */
    return (x + even) - even;
}

static inline vec inverse(vec x) { /* 0 of what is nearly 0, as codebook.inverse */
    const ivec usable = absolute(x) > 1e-30f;
    return (vec)(usable & (ivec)(1.0f / pick(usable, x, all(1.0f))));
}

static inline ivec whole_below(vec x) { /* the floor of numbers that an integer can hold */
    ivec down = __builtin_convertvector(x, ivec);
    return down + (__builtin_convertvector(down, vec) > x); /* a comparison that holds is -1 */
}

/* STEP sums at most: sum[k] += Σ_{j < terms} matrix[j · stride + k] · by[j]. */
static inline void add_product(vec *sum, int64_t count, const float *matrix, int64_t stride, const vec *by, int64_t terms) {
    if (count == STEP) {
        vec own[STEP];
        for (int k = 0; k < STEP; k++) own[k] = sum[k];
        for (int64_t j = 0; j < terms; j++) {
            const float *row = matrix + j * stride;
            for (int k = 0; k < STEP; k++) own[k] += row[k] * by[j];
        }
        for (int k = 0; k < STEP; k++) sum[k] = own[k];
    } else {
        for (int64_t j = 0; j < terms; j++) {
            for (int64_t k = 0; k < count; k++) sum[k] += matrix[j * stride + k] * by[j];
        }
    }
}

static inline vec half(vec x) { /* the nearest number of 16 bits, of two the even one */
    x = clamp(x, -65504.0f, 65504.0f);
    const ivec bits = (ivec)x;
    const vec normal = (vec)((bits + 0xfff + (bits >> 13 & 1)) & ~0x1fff), small = (x + 0.75f) - 0.75f;
    return pick(absolute(x) < 0x1p-14f, small, normal);
}

/* layout.inverse: 0 of 0 alone. */
static inline vec inverse_or_0(vec x) { return (vec)((ivec)(1.0f / x) & (x != 0.0f)); }

/* layout.storable: a step, as 16 bits hold it where that matters. */
static inline vec storable(vec step) { return larger((step + 0.75f) - 0.75f, all(0x1p-24f)); }

/* layout.positive_half and layout.signed_half: never 0 but of 0. */
static inline vec positive_half(vec x) { return (vec)((ivec)larger(half(x), all(0x1p-24f)) & (x > 0.0f)); }

static inline vec signed_half(vec x) {
    const vec near = half(x), tiny = pick(x > 0.0f, all(0x1p-24f), pick(x < 0.0f, all(-0x1p-24f), all(0)));
    return pick(near == 0.0f, tiny, near);
}

#if defined(__clang__)
#define MIXED(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
#define MIXED(x, y, ...) __builtin_shuffle(x, y, (ivec){__VA_ARGS__})
#endif

/* Turn LANES vectors: number l of vector k becomes number k of vector l. */
static inline void turn(vec *x) {
#if defined(__AVX__)
    vec pair[LANES], four[LANES];
    for (int k = 0; k < LANES; k += 2) {
        pair[k] = MIXED(x[k], x[k + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        pair[k + 1] = MIXED(x[k], x[k + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
    for (int k = 0; k < LANES; k += 4) {
        four[k] = MIXED(pair[k], pair[k + 2], 0, 1, 8, 9, 4, 5, 12, 13);
        four[k + 1] = MIXED(pair[k], pair[k + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        four[k + 2] = MIXED(pair[k + 1], pair[k + 3], 0, 1, 8, 9, 4, 5, 12, 13);
        four[k + 3] = MIXED(pair[k + 1], pair[k + 3], 2, 3, 10, 11, 6, 7, 14, 15);
    }
    for (int k = 0; k < LANES / 2; k++) {
        x[k] = MIXED(four[k], four[k + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        x[k + 4] = MIXED(four[k], four[k + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
#else
    for (int k = 0; k < LANES; k++) {
        for (int l = 0; l < k; l++) {
            const float other = x[k][l];
            x[k][l] = x[l][k];
            x[l][k] = other;
        }
    }
#endif
}

/* `n` numbers of LANES blocks side by side, from [blocks, n]; blocks that are missing hold `fill`. */
static inline void gather(vec *to, const float *from, int64_t n, int64_t lanes, float fill) {
    for (int64_t i = 0; i < n; i += LANES) {
        for (int64_t l = 0; l < LANES; l++) to[i + l] = l < lanes ? load(from + l * n + i, LANES) : all(fill);
        turn(to + i);
    }
}

typedef int8_t bytes __attribute__((vector_size(LANES)));

/* The inverse, to bytes; of fewer numbers than LANES as well. */
static inline void scatter(uint8_t *to, const vec *from, int64_t n, int64_t lanes) {
    for (int64_t i = 0; i < n; i += LANES) {
        const int64_t count = n - i < LANES ? n - i : LANES;
        vec x[LANES] = {0};
        for (int64_t k = 0; k < count; k++) x[k] = from[i + k];
        turn(x);
        for (int64_t l = 0; l < lanes && l < LANES; l++) {
            const bytes made = __builtin_convertvector(__builtin_convertvector(x[l], ivec), bytes);
            memcpy(to + l * n + i, &made, count);
        }
    }
}

/* The levels of a format, all integers: every one from low to high, or, by steps of a half from low on, the
   nearest of those there are. */
typedef struct {
    float low, high;
    const float *nearest;
} levels;

static inline vec snap(const levels *of, vec x) {
    if (!of->nearest) return whole(clamp(x, of->low, of->high));
    ivec at = whole_below(clamp(2 * x, 2 * of->low, 2 * of->high)) - (int32_t)(2 * of->low);
    vec found;
    for (int l = 0; l < LANES; l++) found[l] = of->nearest[at[l]];
    return found;
}
