/* Scales of levels, tried. */

#include "lanes.h"

/* iq4.fit: w · x · q and w · q² of the levels q nearest to x · inverse; x and w [k, m], inverses [tried, m], a and b
   [tried, m]. */
void fit_levels(int64_t k, int64_t m, int64_t tried, const levels *of, const float *x, const float *w,
                const float *inverses, float *a, float *b) {
    for (int64_t r = 0; r < m; r += LANES) {
        const int64_t lanes = m - r;
        for (int64_t t = 0; t < tried; t++) {
            const vec by = load(inverses + t * m + r, lanes);
            vec wqx = {0}, wqq = {0};
            for (int64_t i = 0; i < k; i++) {
                const vec own = load(x + i * m + r, lanes), q = snap(of, own * by);
                const vec wq = load(w + i * m + r, lanes) * q;
                wqx += wq * own;
                wqq += wq * q;
            }
            store(a + t * m + r, wqx, lanes);
            store(b + t * m + r, wqq, lanes);
        }
    }
}

/* iq4.codes: x [k, m], inverse [m] to found u8 [k, m]; the table of `of` holds codes. */
void code_levels(int64_t k, int64_t m, const levels *of, const float *x, const float *inverse, uint8_t *found) {
    for (int64_t r = 0; r < m; r += LANES) {
        const int64_t lanes = m - r, count = lanes < LANES ? lanes : LANES;
        const vec by = load(inverse + r, lanes);
        for (int64_t i = 0; i < k; i++) {
            const vec code = snap(of, load(x + i * m + r, lanes) * by);
            const bytes made = __builtin_convertvector(__builtin_convertvector(code, ivec), bytes);
            memcpy(found + i * m + r, &made, count);
        }
    }
}

/* What codebook.Ladder says. */
typedef struct {
    float lowest, highest, step;
} ladder;

static inline vec rung(const ladder *of, vec level) {
    const vec up = clamp((level - of->lowest) / of->step, 0, (of->highest - of->lowest) / of->step);
    return whole(up) * of->step + of->lowest;
}

static inline vec ratio(vec numerator, vec denominator) {
    const ivec usable = denominator > 1e-30f;
    return (vec)(usable & (ivec)(numerator / pick(usable, denominator, all(1))));
}

/* codebook.propose: scale and curvature [s, n], reach [t] to d [n]. */
void propose(int64_t s, int64_t n, int64_t t, const ladder *of, const float *scale, const float *curvature,
             const float *reach, float *d) {
    for (int64_t r = 0; r < n; r += LANES) {
        const int64_t lanes = n - r;
        vec low = load(scale + r, lanes), high = low, best = all(0), least = all(__builtin_inff());
        for (int64_t i = 1; i < s; i++) {
            low = smaller(load(scale + i * n + r, lanes), low);
            high = larger(load(scale + i * n + r, lanes), high);
        }
        const vec largest = pick(high >= -low, high, low);
        for (int64_t k = 0; k < t; k++) {
            vec step = largest / reach[k], used = step, error = all(0);
            for (int round = 0; round < 2; round++) {
                vec up = all(0), down = all(0);
                used = inverse(step);
                for (int64_t i = 0; i < s; i++) {
                    const vec own = load(scale + i * n + r, lanes), level = rung(of, own * used);
                    const vec weighted = load(curvature + i * n + r, lanes) * level;
                    up += weighted * own;
                    down += weighted * level;
                }
                step = ratio(up, down);
            }
            for (int64_t i = 0; i < s; i++) { /* by the levels that gave this step */
                const vec own = load(scale + i * n + r, lanes), off = own - step * rung(of, own * used);
                error += load(curvature + i * n + r, lanes) * (off * off);
            }
            const ivec better = k ? error < least : all_int(-1);
            least = pick(better, error, least);
            best = pick(better, step, best);
        }
        store(d + r, best, lanes);
    }
}
