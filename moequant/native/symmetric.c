/* formats.symmetric: scales of blocks, searched. LANES blocks lie side by side. */

#include "lanes.h"

enum { BLOCK = 256, SUBS = 16, MOVES = 4 };

/* symmetric.Symmetric and symmetric._Plan: landings [places], factors [centers, steps]. */
typedef struct {
    int32_t block, sub, low, high, low_scale, high_scale, places, refits, centers, steps, sweeps;
    const float *landings, *factors;
} symmetric;

/* symmetric._SubFit. */
typedef struct {
    vec error, s, p;
} sub_fit;

typedef struct {
    vec error, d, scale[SUBS];
} super_fit;

/* Counted from the lowest, as torch rounds it. */
static inline vec code_of(const symmetric *of, vec x) {
    return whole(clamp(x - (float)of->low, 0, (float)(of->high - of->low))) + (float)of->low;
}

/* symmetric._solve of codes `by` · x, where that loses less than the best so far. */
static inline void try_scale(const symmetric *of, const vec *x, const vec *w, vec by, sub_fit *fit) {
    vec p = {0}, b = {0};
    for (int i = 0; i < of->sub; i++) {
        const vec c = code_of(of, x[i] * by), wc = w[i] * c;
        p += wc * c;
        b += wc * x[i];
    }
    const vec s = b * inverse_or_0(p), error = -b * s;
    const ivec won = error < fit->error;
    fit->error = pick(won, error, fit->error);
    fit->s = pick(won, s, fit->s);
    fit->p = pick(won, p, fit->p);
}

/* symmetric._fit_sub_blocks of one. */
static inline void fit_sub_block(const symmetric *of, const vec *x, const vec *w, sub_fit *fit) {
    vec low = x[0], high = x[0];
    for (int i = 1; i < of->sub; i++) {
        low = smaller(x[i], low);
        high = larger(x[i], high);
    }
    const vec largest = inverse_or_0(pick(high > -low, high, low));
    *fit = (sub_fit){0};
    for (int k = 0; k < of->places; k++) try_scale(of, x, w, largest * of->landings[k], fit);
    for (int k = 0; k < of->refits; k++) try_scale(of, x, w, inverse_or_0(fit->s), fit);
}

/* symmetric._round_scales. */
static inline void round_scales(const symmetric *of, int subs, const sub_fit *fits, const float *factors, super_fit *made) {
    vec low = fits[0].s, high = fits[0].s, best = {0}, least = all(__builtin_inff());
    for (int s = 1; s < subs; s++) {
        low = smaller(fits[s].s, low);
        high = larger(fits[s].s, high);
    }
    const float first = (float)of->low_scale, last = (float)of->high_scale;
    const vec sign = pick(high > -low, all(-1), all(1)); /* the largest takes the longer, negative side of the integers */
    const vec unit = larger(high, -low) / -first;
    for (int k = 0; k < of->steps; k++) {
        const vec size = storable(unit * factors[k]), step = size * sign, by = 1.0f / step;
        vec cost = {0};
        for (int s = 0; s < subs; s++) {
            const vec lost = step * whole(clamp(fits[s].s * by, first, last)) - fits[s].s;
            cost += fits[s].p * (lost * lost);
        }
        const ivec won = cost <= least; /* of several the largest, which comes last */
        least = pick(won, cost, least);
        best = pick(won, size, best);
    }
    made->d = sign * half(best);
    const vec by = inverse_or_0(made->d);
    for (int s = 0; s < subs; s++) made->scale[s] = whole(clamp(fits[s].s * by, first, last));
    made->error = all(__builtin_inff());
}

/* symmetric._error. */
static inline vec error_of(const symmetric *of, const vec *x, const vec *w, vec s) {
    const vec by = inverse_or_0(s);
    vec error = {0};
    for (int i = 0; i < of->sub; i++) {
        const vec left = x[i] - s * code_of(of, x[i] * by);
        error += w[i] * (left * left);
    }
    return error;
}

/* symmetric._descend. */
static inline void descend(const symmetric *of, int subs, const vec *x, const vec *w, super_fit *fit) {
    static const float moves[MOVES] = {-2, -1, 1, 2};
    fit->error = all(0);
    for (int s = 0; s < subs; s++) {
        const vec *own = x + s * of->sub, *by = w + s * of->sub, scale = fit->scale[s];
        vec least = error_of(of, own, by, fit->d * scale);
        for (int k = 0; k < MOVES; k++) {
            const vec other = clamp(scale + moves[k], (float)of->low_scale, (float)of->high_scale);
            const vec error = error_of(of, own, by, fit->d * other);
            const ivec won = error < least;
            least = pick(won, error, least);
            fit->scale[s] = pick(won, other, fit->scale[s]);
        }
        fit->error += least;
    }
}

/* symmetric._refit_step. */
static inline void refit_step(const symmetric *of, int subs, const vec *x, const vec *w, super_fit *fit) {
    vec uu = {0}, xu = {0};
    for (int s = 0; s < subs; s++) {
        const vec *own = x + s * of->sub, *weight = w + s * of->sub, by = inverse_or_0(fit->d * fit->scale[s]);
        vec p = {0}, b = {0};
        for (int i = 0; i < of->sub; i++) {
            const vec c = code_of(of, own[i] * by), wc = weight[i] * c;
            p += wc * c;
            b += wc * own[i];
        }
        uu += p * fit->scale[s] * fit->scale[s];
        xu += b * fit->scale[s];
    }
    const vec d = signed_half(pick(uu > 0.0f, xu / uu, fit->d));
    const vec error = fit->error + (d * (d * uu - 2 * xu) - fit->d * (fit->d * uu - 2 * xu));
    const ivec won = error < fit->error;
    fit->error = pick(won, error, fit->error);
    fit->d = pick(won, d, fit->d);
}

static inline void or_better(int subs, super_fit *best, const super_fit *other) {
    const ivec won = other->error < best->error;
    best->error = pick(won, other->error, best->error);
    best->d = pick(won, other->d, best->d);
    for (int s = 0; s < subs; s++) best->scale[s] = pick(won, other->scale[s], best->scale[s]);
}

/* symmetric.search, and symmetric.search_block where low_scale is 0: x and w f32 [blocks, block] to codes i8 [blocks,
   block], scale i8 [blocks, sub-blocks] (nothing where low_scale is 0) and d f32 [blocks]. */
void search_symmetric(int64_t blocks, const symmetric *of, const float *x, const float *w, int8_t *codes, int8_t *scale,
                      float *d) {
    const int subs = of->block / of->sub;
    for (int64_t r = 0; r < blocks; r += LANES) {
        const int64_t lanes = blocks - r;
        vec own[BLOCK], by[BLOCK];
        sub_fit fits[SUBS];
        super_fit best;
        gather(own, x + r * of->block, of->block, lanes, 0);
        gather(by, w + r * of->block, of->block, lanes, 1);
        for (int s = 0; s < subs; s++) fit_sub_block(of, own + s * of->sub, by + s * of->sub, fits + s);
        if (of->low_scale) {
            for (int k = 0; k < of->centers; k++) {
                super_fit made;
                round_scales(of, subs, fits, of->factors + k * of->steps, &made);
                for (int sweep = 0; sweep < of->sweeps; sweep++) {
                    descend(of, subs, own, by, &made);
                    refit_step(of, subs, own, by, &made);
                }
                if (k) or_better(subs, &best, &made);
                else best = made;
            }
        } else {
            best.d = signed_half(fits[0].s);
            best.scale[0] = all(1);
        }
        for (int s = 0; s < subs; s++) {
            const vec inverse_s = inverse_or_0(best.d * best.scale[s]);
            for (int i = s * of->sub; i < (s + 1) * of->sub; i++) own[i] = code_of(of, own[i] * inverse_s);
        }
        scatter((uint8_t *)codes + r * of->block, own, of->block, lanes);
        if (of->low_scale) scatter((uint8_t *)scale + r * subs, best.scale, subs, lanes);
        store(d + r, best.d, lanes);
    }
}
