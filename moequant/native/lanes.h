/* Vectors for loops over rows: everything is f32 and lies columns first, [columns, rows]. Rows do not depend on each
   other: LANES of them are computed side by side in one vector. moequant.rounding has a function of the same name for
   each of the exported ones, which computes the same with torch and says what it is for. */

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

static inline vec pick(ivec which, vec yes, vec no) { return (vec)((which & (ivec)yes) | (~which & (ivec)no)); }

static inline ivec pick_int(ivec which, ivec yes, ivec no) { return (which & yes) | (~which & no); }

static inline vec absolute(vec x) { return (vec)((ivec)x & 0x7fffffff); }

static inline vec clamp(vec x, float low, float high) {
    x = pick(x > low, x, all(low)); /* what is no number as well */
    return pick(x < high, x, all(high));
}

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
