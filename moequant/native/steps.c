/* What levels are multiplied with, and what is subtracted. */

#include "lanes.h"

/* How the weights of a block come about: d · scales[code] · level - dmin · minimum. Minima are their codes, of which there
   are so many; where there is but one it is `only`. */
typedef struct {
    int32_t sub, lowest, highest, minima, moves_scales, moves_d;
    float only;
    const float *scales;
} steps;

enum { WIDE = 256, REACH = 2 };

static inline vec looked_up(const float *table, vec code) {
    const ivec at = __builtin_convertvector(code, ivec);
    vec found;
    for (int l = 0; l < LANES; l++) found[l] = table[at[l]];
    return found;
}

static inline vec sum_of(const vec *x, int64_t n) {
    vec sum = {0};
    for (int64_t i = 0; i < n; i++) sum += x[i];
    return sum;
}

static inline vec product(const vec *x, const vec *y, int64_t n) {
    vec sum = {0};
    for (int64_t i = 0; i < n; i++) sum += x[i] * y[i];
    return sum;
}

/* A block of LANES rows: levels, the gradient, H times a sub-block's levels and times all levels with their scales. */
typedef struct {
    vec level[WIDE], gradient[WIDE], pushed[WIDE], unit[WIDE];
    vec d, dmin;
} block;

/* descent.move_scales of the sub-block from column `at`. across [n]: H times 1 for each of its columns. */
static inline void move_scale(const steps *of, int64_t n, int64_t at, const float *across, block *b, vec *code,
                              vec *minimum) {
    const vec *level = b->level + at, *gradient = b->gradient + at;
    const vec energy = product(level, b->pushed + at, of->sub), pull = product(level, gradient, of->sub);
    const vec old = *code, was = looked_up(of->scales, old), old_minimum = *minimum;
    vec lean = {0}, slope = {0}, curve = {0}, least = {0}, grown = {0}, lift = {0};
    for (int64_t i = 0; of->minima && i < of->sub; i++) {
        lean += across[at + i] * level[i];
        slope += gradient[i];
        curve += across[at + i];
    }
    const vec by = inverse(curve * b->dmin);
    for (int k = -REACH; k <= REACH; k++) {
        const vec other = clamp(old + (float)k, (float)of->lowest, (float)of->highest);
        const vec grows = b->d * (looked_up(of->scales, other) - was);
        vec change = grows * (grows * energy - 2 * pull), lifts = {0}, low = old_minimum;
        if (of->minima) {
            const vec wants = grows * lean - slope;
            low = clamp(low + whole(clamp(wants * by, -REACH, REACH)), 0, (float)(of->minima - 1));
            lifts = b->dmin * (low - old_minimum);
            change += lifts * (lifts * curve - 2 * wants);
        }
        if (!k) change = pick(change < 0, change, all(0));
        const ivec better = k == -REACH ? all_int(-1) : change < least;
        least = pick(better, change, least);
        *code = pick(better, other, *code);
        *minimum = pick(better, low, *minimum);
        grown = pick(better, grows, grown);
        lift = pick(better, lifts, lift);
    }
    for (int64_t i = 0; i < n; i++) b->gradient[i] -= grown * b->pushed[i] - lift * across[i];
}

/* descent.solve_steps, with the minima of sub-blocks; across [sub-blocks, n]. */
static inline void solve(const steps *of, int64_t n, const float *across, const vec *scale, const vec *minimum, block *b) {
    vec uu = {0}, ug = {0}, uv = {0}, vg = {0}, vv = {0}, lift = {0};
    for (int64_t at = 0, s = 0; at < n; at += of->sub, s++) {
        uu += scale[s] * product(b->level + at, b->unit + at, of->sub);
        ug += scale[s] * product(b->level + at, b->gradient + at, of->sub);
    }
    const vec alone = half(b->d + ug * inverse(uu)) - b->d;
    vec best = alone * (alone * uu - 2 * ug), grown = pick(best < 0, alone, all(0)), low[WIDE];
    if (of->minima) {
        for (int64_t i = 0; i < n; i++) low[i] = all(0);
        for (int64_t at = 0, s = 0; at < n; at += of->sub, s++) {
            uv += minimum[s] * sum_of(b->unit + at, of->sub);
            vg += minimum[s] * sum_of(b->gradient + at, of->sub);
            for (int64_t i = 0; i < n; i++) low[i] += across[s * n + i] * minimum[s];
        }
        for (int64_t at = 0, s = 0; at < n; at += of->sub, s++) vv += minimum[s] * sum_of(low + at, of->sub);
        const vec det = uu * vv - uv * uv, by = pick(det > 1e-6f * uu * vv, 1.0f / det, all(0));
        const vec both = half(b->d + (ug * vv - vg * uv) * by) - b->d;
        const vec lifts = half(b->dmin + (ug * uv - vg * uu) * by) - b->dmin;
        const vec change = both * (both * uu - 2 * ug - 2 * lifts * uv) + lifts * (lifts * vv + 2 * vg);
        const ivec won = change < pick(best < 0, best, all(0));
        grown = pick(won, both, grown);
        lift = pick(won, lifts, all(0));
        b->dmin += lift;
        for (int64_t i = 0; i < n; i++) b->gradient[i] += low[i] * lift;
    }
    b->d += grown;
    for (int64_t i = 0; i < n; i++) b->gradient[i] -= b->unit[i] * grown;
}

/* descent.move_steps of a block of n columns, WIDE at most. hessian [n, n] with `stride`, symmetric; level and gradient
   [n, rows]; scale and minimum [sub-blocks, rows], codes; d and dmin [rows]. NULL: there is no such thing. */
void move_steps(int64_t n, int64_t rows, const steps *of, const float *hessian, int64_t stride, const float *level,
                float *gradient, float *scale, float *minimum, float *d, float *dmin) {
    const int64_t subs = n / of->sub;
    float across[subs * n];
    for (int64_t s = 0; s < subs; s++) {
        for (int64_t i = 0; i < n; i++) {
            float sum = 0;
            for (int64_t j = 0; j < of->sub; j++) sum += hessian[i * stride + s * of->sub + j];
            across[s * n + i] = sum;
        }
    }
    for (int64_t r = 0; r < rows; r += LANES) {
        const int64_t lanes = rows - r;
        block b;
        vec step[subs], low[subs];
        for (int64_t i = 0; i < n; i++) {
            b.level[i] = load(level + i * rows + r, lanes);
            b.gradient[i] = load(gradient + i * rows + r, lanes);
            b.unit[i] = all(0);
        }
        b.d = load(d + r, lanes);
        b.dmin = of->minima ? load(dmin + r, lanes) : all(0);
        for (int64_t s = 0; s < subs; s++) {
            const int64_t at = s * of->sub;
            vec code = load(scale + s * rows + r, lanes);
            low[s] = of->minima ? load(minimum + s * rows + r, lanes) : all(0);
            for (int64_t i = 0; i < n; i += STEP) {
                for (int64_t k = 0; k < STEP; k++) b.pushed[i + k] = all(0);
                add_product(b.pushed + i, n - i < STEP ? n - i : STEP, hessian + at * stride + i, stride, b.level + at, of->sub);
            }
            if (of->moves_scales) {
                move_scale(of, n, at, across + s * n, &b, &code, low + s);
                store(scale + s * rows + r, code, lanes);
                if (of->minima) store(minimum + s * rows + r, low[s], lanes);
            }
            step[s] = looked_up(of->scales, code);
            if (of->minima == 1) low[s] = all(of->only);
            for (int64_t i = 0; i < n; i++) b.unit[i] += step[s] * b.pushed[i];
        }
        if (of->moves_d) {
            solve(of, n, across, step, low, &b);
            store(d + r, b.d, lanes);
            if (of->minima) store(dmin + r, b.dmin, lanes);
        }
        for (int64_t i = 0; i < n; i++) store(gradient + i * rows + r, b.gradient[i], lanes);
    }
}
