/* formats.affine: scales and minima of blocks, searched. LANES blocks lie side by side. */

#include "lanes.h"

enum { BLOCK = 256, SUBS = 16, NEIGHBOURS = 6 };

/* affine.Affine and affine._Plan: lines [ends, 2] are slopes and offsets, factors [pairs, 2, steps]. */
typedef struct {
    int32_t block, sub, top, top_scale, ends, refits, pairs, steps, sweeps;
    const float *lines, *factors;
} affine;

/* Of a sub-block: affine._Moments, and affine._SubFit, the best so far. */
typedef struct {
    vec total, mean, power, middle, reach;
    vec error, s, m, p, q;
} sub_fit;

typedef struct {
    vec error, d, dmin, scale[SUBS], minimum[SUBS];
} super_fit;

static inline vec code_of(vec x, float top) { return whole(clamp(x, 0, top)); }

/* The fit with these codes of least error, where that is less than the best so far. */
static inline void solve(const affine *of, sub_fit *fit, vec p, vec q, vec b) {
    const vec by_total = 1.0f / fit->total, spread = p - q * q * by_total;
    vec scale = b / spread, minimum = scale * q * by_total - fit->mean, error = fit->power - b * scale;
    ivec free = (spread > 1e-6f * p) & (scale > 0.0f);
    if (of->top_scale) { /* a minimum cannot be negative: then it is 0, and the scale is solved alone */
        free &= minimum >= 0.0f;
        const vec alone = b + fit->mean * q, scale0 = alone / p;
        const vec error0 = fit->power + fit->mean * fit->mean * fit->total - alone * scale0;
        const ivec usable = (p > 0.0f) & (alone > 0.0f);
        error = pick(free, error, pick(usable, error0, all(__builtin_inff())));
        scale = pick(free, scale, scale0);
        minimum = pick(free, minimum, all(0));
    } else {
        error = pick(free, error, all(__builtin_inff()));
    }
    const ivec won = error < fit->error;
    fit->error = pick(won, error, fit->error);
    fit->s = pick(won, scale, fit->s);
    fit->m = pick(won, minimum, fit->m);
    fit->p = pick(won, p, fit->p);
    fit->q = pick(won, q, fit->q);
}

/* affine._solve of codes slope · (x - middle) + offset. */
static inline void try_line(const affine *of, const vec *x, const vec *w, vec middle, vec slope, vec offset, sub_fit *fit) {
    vec p = {0}, q = {0}, b = {0};
    for (int i = 0; i < of->sub; i++) {
        const vec c = code_of((x[i] - middle) * slope + offset, (float)of->top), wc = w[i] * c;
        p += wc * c;
        q += wc;
        b += wc * (x[i] - fit->mean);
    }
    solve(of, fit, p, q, b);
}

/* affine._fit_sub_blocks of one. */
static inline void fit_sub_block(const affine *of, const vec *x, const vec *w, sub_fit *fit) {
    vec total = {0}, sum = {0}, power = {0}, low = x[0], high = x[0];
    for (int i = 0; i < of->sub; i++) {
        total += w[i];
        sum += w[i] * x[i];
        low = smaller(x[i], low);
        high = larger(x[i], high);
    }
    const vec mean = sum / total;
    for (int i = 0; i < of->sub; i++) power += w[i] * ((x[i] - mean) * (x[i] - mean));
    if (of->top_scale) low = smaller(low, all(0));
    const vec m = of->top_scale ? larger(-mean, all(0)) : -mean, off = m + mean;
    *fit = (sub_fit){total, mean, power, (low + high) / 2, (high - low) / 2, power + off * off * total, all(0), m, all(0), all(0)};
    const vec by = inverse_or_0(fit->reach);
    for (int e = 0; e < of->ends; e++) {
        try_line(of, x, w, fit->middle, by * of->lines[2 * e], all(of->lines[2 * e + 1]), fit);
    }
    for (int k = 0; k < of->refits; k++) {
        const vec slope = inverse_or_0(fit->s);
        try_line(of, x, w, all(0), slope, fit->m * slope, fit);
    }
}

/* affine._cheapest_step: of all sub-blocks, what they want at which price. */
static inline vec cheapest_step(const affine *of, int subs, const vec *price, const vec *wanted, const float *factors) {
    vec largest = all(0), best = {0}, least = all(__builtin_inff());
    for (int s = 0; s < subs; s++) largest = larger(wanted[s], largest);
    const vec unit = largest / (float)of->top_scale;
    for (int k = 0; k < of->steps; k++) {
        const vec step = storable(unit * factors[k]), by = 1.0f / step;
        vec cost = {0};
        for (int s = 0; s < subs; s++) {
            const vec lost = step * code_of(wanted[s] * by, (float)of->top_scale) - wanted[s];
            cost += price[s] * (lost * lost);
        }
        const ivec won = cost <= least; /* of several the largest, which comes last */
        least = pick(won, cost, least);
        best = pick(won, step, best);
    }
    return half(best);
}

/* affine._round_scales. */
static inline void round_scales(const affine *of, int subs, const sub_fit *fits, const float *factors, super_fit *made) {
    vec price[SUBS], wanted[SUBS], shift[SUBS];
    const float top = (float)of->top_scale;
    for (int s = 0; s < subs; s++) {
        shift[s] = fits[s].q / fits[s].total;
        price[s] = fits[s].p - fits[s].q * shift[s];
        wanted[s] = fits[s].s;
    }
    made->d = cheapest_step(of, subs, price, wanted, factors);
    vec by = inverse_or_0(made->d), moved[SUBS];
    for (int s = 0; s < subs; s++) {
        made->scale[s] = code_of(fits[s].s * by, top);
        moved[s] = fits[s].m + (made->d * made->scale[s] - fits[s].s) * shift[s];
        wanted[s] = larger(moved[s], all(0));
        price[s] = fits[s].total;
    }
    made->dmin = cheapest_step(of, subs, price, wanted, factors + of->steps);
    by = inverse_or_0(made->dmin);
    for (int s = 0; s < subs; s++) made->minimum[s] = code_of(moved[s] * by, top);
    made->error = all(__builtin_inff());
}

/* affine._error. */
static inline vec error_of(const affine *of, const vec *x, const vec *w, vec s, vec m) {
    const vec by = inverse_or_0(s), offset = m * by;
    vec error = {0};
    for (int i = 0; i < of->sub; i++) {
        const vec left = x[i] + m - s * code_of(x[i] * by + offset, (float)of->top);
        error += w[i] * (left * left);
    }
    return error;
}

/* affine._descend. */
static inline void descend(const affine *of, int subs, const vec *x, const vec *w, super_fit *fit) {
    static const float moves[NEIGHBOURS][2] = {{-1, -1}, {-1, 0}, {0, -1}, {0, 1}, {1, 0}, {1, 1}};
    const float top = (float)of->top_scale;
    fit->error = all(0);
    for (int s = 0; s < subs; s++) {
        const vec *own = x + s * of->sub, *by = w + s * of->sub, scale = fit->scale[s], minimum = fit->minimum[s];
        vec least = error_of(of, own, by, fit->d * scale, fit->dmin * minimum);
        for (int k = 0; k < NEIGHBOURS; k++) {
            const vec a = clamp(scale + moves[k][0], 0, top), b = clamp(minimum + moves[k][1], 0, top);
            const vec error = error_of(of, own, by, fit->d * a, fit->dmin * b);
            const ivec won = error < least;
            least = pick(won, error, least);
            fit->scale[s] = pick(won, a, fit->scale[s]);
            fit->minimum[s] = pick(won, b, fit->minimum[s]);
        }
        fit->error += least;
    }
}

/* What steps d and dmin lose of a super-block, up to a constant. */
typedef struct {
    vec uu, uv, vv, xu, xv;
} form;

static inline vec cost_of(const form *f, vec d, vec dmin) {
    return d * (d * f->uu - 2 * (dmin * f->uv + f->xu)) + dmin * (dmin * f->vv + 2 * f->xv);
}

/* affine._refit_steps. */
static inline void refit_steps(const affine *of, int subs, const vec *x, const vec *w, const sub_fit *fits, super_fit *fit) {
    form f = {0};
    for (int s = 0; s < subs; s++) {
        const vec *own = x + s * of->sub, *weight = w + s * of->sub, scale = fit->scale[s], minimum = fit->minimum[s];
        const vec by = inverse_or_0(fit->d * scale), offset = fit->dmin * minimum * by, r = fits[s].total;
        vec p = {0}, q = {0}, b = {0};
        for (int i = 0; i < of->sub; i++) {
            const vec c = code_of(own[i] * by + offset, (float)of->top), wc = weight[i] * c;
            p += wc * c;
            q += wc;
            b += wc * own[i];
        }
        f.uu += p * scale * scale;
        f.vv += r * minimum * minimum;
        f.uv += q * scale * minimum;
        f.xu += b * scale;
        f.xv += r * fits[s].mean * minimum;
    }
    const vec det = f.uu * f.vv - f.uv * f.uv;
    const ivec both = det > 1e-6f * f.uu * f.vv; /* else dmin is nothing or follows d, which is left to solve alone */
    vec d = pick(both, (f.xu * f.vv - f.xv * f.uv) / det, (f.xu + fit->dmin * f.uv) / f.uu);
    vec dmin = pick(both, (f.xu * f.uv - f.xv * f.uu) / det, fit->dmin);
    const ivec good = (f.uu > 0.0f) & (d > 0.0f) & (dmin >= 0.0f);
    d = positive_half(pick(good, d, fit->d));
    dmin = positive_half(pick(good, dmin, fit->dmin));
    const vec error = fit->error + (cost_of(&f, d, dmin) - cost_of(&f, fit->d, fit->dmin));
    const ivec won = error < fit->error;
    fit->error = pick(won, error, fit->error);
    fit->d = pick(won, d, fit->d);
    fit->dmin = pick(won, dmin, fit->dmin);
}

static inline void or_better(int subs, super_fit *best, const super_fit *other) {
    const ivec won = other->error < best->error;
    best->error = pick(won, other->error, best->error);
    best->d = pick(won, other->d, best->d);
    best->dmin = pick(won, other->dmin, best->dmin);
    for (int s = 0; s < subs; s++) {
        best->scale[s] = pick(won, other->scale[s], best->scale[s]);
        best->minimum[s] = pick(won, other->minimum[s], best->minimum[s]);
    }
}

/* affine.search, and affine.search_block where top_scale is 0: x and w f32 [blocks, block] to codes u8 [blocks, block],
   scale and minimum u8 [blocks, sub-blocks] (nothing where top_scale is 0), d and dmin f32 [blocks]. */
void search_affine(int64_t blocks, const affine *of, const float *x, const float *w, uint8_t *codes, uint8_t *scale,
                   uint8_t *minimum, float *d, float *dmin) {
    const int subs = of->block / of->sub;
    for (int64_t r = 0; r < blocks; r += LANES) {
        const int64_t lanes = blocks - r;
        vec own[BLOCK], by[BLOCK];
        sub_fit fits[SUBS];
        super_fit best;
        gather(own, x + r * of->block, of->block, lanes, 0);
        gather(by, w + r * of->block, of->block, lanes, 1);
        for (int s = 0; s < subs; s++) fit_sub_block(of, own + s * of->sub, by + s * of->sub, fits + s);
        if (of->top_scale) {
            for (int k = 0; k < of->pairs; k++) {
                super_fit made;
                round_scales(of, subs, fits, of->factors + 2 * k * of->steps, &made);
                for (int sweep = 0; sweep < of->sweeps; sweep++) {
                    descend(of, subs, own, by, &made);
                    refit_steps(of, subs, own, by, fits, &made);
                }
                if (k) or_better(subs, &best, &made);
                else best = made;
            }
        } else {
            best.d = positive_half(fits[0].s);
            best.dmin = half(fits[0].m);
            best.scale[0] = best.minimum[0] = all(1);
        }
        for (int s = 0; s < subs; s++) {
            const vec inverse_s = inverse_or_0(best.d * best.scale[s]), m = best.dmin * best.minimum[s];
            for (int i = s * of->sub; i < (s + 1) * of->sub; i++) own[i] = code_of((own[i] + m) * inverse_s, (float)of->top);
        }
        scatter(codes + r * of->block, own, of->block, lanes);
        if (of->top_scale) {
            scatter(scale + r * subs, best.scale, subs, lanes);
            scatter(minimum + r * subs, best.minimum, subs, lanes);
        }
        store(d + r, best.d, lanes);
        store(dmin + r, best.dmin, lanes);
    }
}
