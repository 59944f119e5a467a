/* Levels of vector formats, eight columns at once. */

#include "lanes.h"

/* What grids.Layout says of a format, and rows.near_lists: words [listed, keys]. */
typedef struct {
    int32_t group, bits, highest, even, is_signed, listed, keys, down;
    float low, step, extra, delta;
    const int32_t *words;
} grid;

/* Points for `n` weights of LANES rows, and what they leave by the metric. */
typedef struct {
    vec level[EIGHT], error;
    ivec row[2];
} found;

/* (value - low) / step of weight i in rows of the grid. */
static inline vec steps_up(const grid *g, ivec word, int i) {
    const ivec c = word >> (g->bits * i) & ((1 << g->bits) - 1);
    const vec up = __builtin_convertvector(c, vec);
    return g->extra ? up + (vec)((c == g->highest) & (ivec)all(g->extra / g->step)) : up;
}

static inline vec value(const grid *g, ivec word, int i, float low) { return low + g->step * steps_up(g, word, i); }

static inline ivec words_of(const int32_t *words, ivec key) {
    ivec found;
    for (int l = 0; l < LANES; l++) found[l] = words[key[l]];
    return found;
}

/* vectors._best: one row of the grid for weights x[0..n), with those signs, under corner[i, i + 1..] (EIGHT to a line). */
static inline __attribute__((always_inline)) void best_of(const grid *g, int n, const vec *x, const vec *sign, vec step,
                                                          const float *corner, float shift, found *out) {
    const float low = g->low + shift;
    const vec by_step = inverse(step);
    ivec key = {0};
    for (int i = 0; i < n; i++) {
        vec c = clamp((x[i] * sign[i] * by_step - low) / g->step + 0.5f, 0, (float)g->highest);
        key = key * (g->highest + 1) + __builtin_convertvector(c, ivec);
    }
    vec by[EIGHT], least = all(__builtin_inff());
    ivec word = {0};
    for (int i = 0; i < n; i++) by[i] = step * sign[i];
    for (int candidate = 0; candidate < g->listed; candidate++) {
        const ivec other = words_of(g->words + (int64_t)candidate * g->keys, key);
        vec off[EIGHT], error = {0};
        for (int i = 0; i < n; i++) {
            off[i] = x[i] - by[i] * value(g, other, i, low);
            vec felt = off[0] * corner[i];
            for (int j = 1; j <= i; j++) felt += off[j] * corner[j * EIGHT + i];
            error += felt * felt;
        }
        ivec better = error < least;
        least = pick(better, error, least);
        word = pick_int(better, other, word);
    }
    for (int i = 0; i < n; i++) out->level[i] = sign[i] * value(g, word, i, low);
    out->row[0] = (word >> 16 & 0xFFF) | (shift < 0 ? g->down : 0);
    out->row[1] = all_int(0);
    out->error = least;
}

/* The same, compiled once for each n that there is. */
static __attribute__((noinline)) void best(const grid *g, int n, const vec *x, const vec *sign, const vec *step,
                                           const float *corner, float shift, found *out) {
    if (n == EIGHT) {
        best_of(g, EIGHT, x, sign, *step, corner, shift, out);
    } else {
        best_of(g, EIGHT / 2, x, sign, *step, corner, shift, out);
    }
}

/* The one of less error; another than `one` only where it is allowed, NULL: everywhere. */
static void or_better(int n, found *one, const found *other, const ivec *allowed) {
    ivec won = other->error < one->error;
    if (allowed) won &= *allowed;
    for (int i = 0; i < n; i++) one->level[i] = pick(won, other->level[i], one->level[i]);
    for (int i = 0; i < 2; i++) one->row[i] = pick_int(won, other->row[i], one->row[i]);
    one->error = pick(won, other->error, one->error);
}

/* vectors._signs and _nearest_rows of a grid without signs; odd: 0, 1, or -1 for a number of signs that is free. */
static void best_signs(const grid *g, int n, const vec *x, const vec *step, const float *corner, int odd, found *out) {
    const vec plus = all(1.0f), infinite = all(__builtin_inff());
    vec sign[EIGHT], cost[EIGHT], least = infinite, second = infinite;
    ivec negative = {0}, cheapest = {0}, next = {0};
    for (int i = 0; i < n; i++) {
        ivec below = x[i] < 0.0f;
        sign[i] = pick(below, -plus, plus);
        negative ^= below;
        float weight = 0;
        for (int j = i; j < n; j++) weight += corner[i * EIGHT + j] * corner[i * EIGHT + j];
        cost[i] = weight * absolute(x[i]);
        ivec first = cost[i] < least, other = cost[i] < second;
        next = pick_int(first, cheapest, pick_int(other, all_int(i), next));
        second = pick(first, least, pick(other, cost[i], second));
        cheapest = pick_int(first, all_int(i), cheapest);
        least = pick(first, cost[i], least);
    }
    /* The sign that is cheapest to turn is turned in one of both; where the number is wrong, another in the other. */
    ivec wrong = odd < 0 ? all_int(0) : negative ^ all_int(-odd);
    vec turned[EIGHT];
    for (int i = 0; i < n; i++) {
        vec once = pick(cheapest == i, -sign[i], sign[i]), last = pick(next == i, -sign[i], sign[i]);
        vec both = pick(next == i, -once, once);
        turned[i] = odd < 0 ? once : pick(wrong, last, both);
        sign[i] = pick(wrong, once, sign[i]);
    }
    found other;
    best(g, n, x, sign, step, corner, 0, out);
    best(g, n, x, turned, step, corner, 0, &other);
    or_better(n, out, &other, NULL);
}

/* vectors._nearest_pair: the second four make up for what the first leave. */
static void best_pair(const grid *g, const vec *x, const vec *step, const float *corner, int odd, found *out) {
    enum { HALF = EIGHT / 2 };
    vec left[HALF], rest[HALF];
    best_signs(g, HALF, x, step, corner, odd, out);
    for (int i = 0; i < HALF; i++) left[i] = x[i] - *step * out->level[i];
    for (int i = 0; i < HALF; i++) {
        vec undone = {0};
        for (int j = 0; j < HALF; j++) undone += left[j] * corner[j * EIGHT + HALF + i];
        for (int j = 0; j < i; j++) undone -= rest[j] * corner[(HALF + j) * EIGHT + HALF + i];
        rest[i] = undone / corner[(HALF + i) * EIGHT + HALF + i];
    }
    for (int i = 0; i < HALF; i++) rest[i] += x[HALF + i];
    found last;
    best_signs(g, HALF, rest, step, corner + HALF * EIGHT + HALF, odd, &last);
    for (int i = 0; i < HALF; i++) out->level[HALF + i] = last.level[i];
    out->row[1] = last.row[0];
    out->error += last.error;
}

static void best_shift(const grid *g, const vec *x, const vec *step, const float *corner, const vec *settled,
                       found *out) {
    vec plus[EIGHT];
    found down;
    for (int i = 0; i < EIGHT; i++) plus[i] = all(1.0f);
    best(g, EIGHT, x, plus, step, corner, g->delta, out);
    best(g, EIGHT, x, plus, step, corner, -g->delta, &down);
    if (settled) {
        const ivec shifted = *settled > 0.0f;
        out->error = pick(shifted, all(__builtin_inff()), out->error);
        or_better(EIGHT, out, &down, &shifted);
    } else {
        or_better(EIGHT, out, &down, NULL);
    }
}

/* vectors.nearest_points: x and level [EIGHT, rows], step, error and settled [rows] (1: shifted down; NULL: free),
   corner [EIGHT, EIGHT], row [EIGHT / group, rows]. */
void nearest_points(int64_t rows, const grid *g, const float *x, const float *step, const float *corner,
                    const float *settled, float *level, int32_t *row, float *error) {
    for (int64_t r = 0; r < rows; r += LANES) {
        const int64_t lanes = rows - r;
        vec weights[EIGHT], by = load(step + r, lanes), down = all(0.0f);
        for (int i = 0; i < EIGHT; i++) weights[i] = load(x + i * rows + r, lanes);
        if (settled) down = load(settled + r, lanes);
        found out, odd;
        if (g->is_signed) {
            best_shift(g, weights, &by, corner, settled ? &down : NULL, &out);
        } else if (g->group == EIGHT) {
            best_signs(g, EIGHT, weights, &by, corner, g->even ? 0 : -1, &out);
        } else {
            best_pair(g, weights, &by, corner, g->even ? 0 : -1, &out);
            if (g->even) {
                best_pair(g, weights, &by, corner, 1, &odd);
                or_better(EIGHT, &out, &odd, NULL);
            }
        }
        for (int i = 0; i < EIGHT; i++) store(level + i * rows + r, out.level[i], lanes);
        for (int i = 0; i < EIGHT / g->group; i++) store((float *)row + i * rows + r, (vec)out.row[i], lanes);
        store(error + r, out.error, lanes);
    }
}

/* rows.closest of one group of n weights, of LANES sub-blocks. */
static inline __attribute__((always_inline)) void closest_of(const grid *g, int n, const float *x, const float *w,
                                                             int64_t next, int64_t lanes, vec inverse, vec low,
                                                             ivec shifted, ivec *word, vec *least) {
    vec pull[EIGHT], weight[EIGHT], start = {0};
    ivec key = {0};
    for (int i = 0; i < n; i++) {
        const vec t = load(x + i * next, lanes) * inverse, up = t - low;
        weight[i] = load(w + i * next, lanes);
        key = key * (g->highest + 1) + __builtin_convertvector(clamp(up + 0.5f, 0, (float)g->highest), ivec);
        pull[i] = -2 * weight[i] * up;
        start += weight[i] * low * (low - 2 * t); /* what the row of nothing but `low` leaves */
    }
    for (int candidate = 0; candidate < g->listed; candidate++) {
        const ivec other = words_of(g->words + (int64_t)candidate * g->keys, key);
        vec error = start;
        for (int i = 0; i < n; i++) {
            const vec c = steps_up(g, other, i);
            error += c * (weight[i] * c + pull[i]);
        }
        const ivec better = error < *least;
        *least = pick(better, error, *least);
        *word = pick_int(better, other | shifted, *word);
    }
}

/* rows.closest: x and w [group, parts, m], inverse and shift [m], word and least [parts, m]; those are what was found
   before. */
void closest(int64_t parts, int64_t m, const grid *g, const float *x, const float *w, const float *inverse,
             const float *shift, int32_t *word, float *least) {
    for (int64_t r = 0; r < m; r += LANES) {
        const int64_t lanes = m - r;
        const vec by = load(inverse + r, lanes) / g->step, shifts = load(shift + r, lanes);
        const vec low = (shifts + g->low) / g->step;
        const ivec shifted = g->delta ? (shifts < 0.0f) & all_int(g->down) : all_int(0);
        for (int64_t p = 0; p < parts; p++) {
            const int64_t at = p * m + r;
            vec error = load(least + at, lanes);
            ivec rows = (ivec)load((const float *)word + at, lanes);
            if (g->group == EIGHT) closest_of(g, EIGHT, x + at, w + at, parts * m, lanes, by, low, shifted, &rows, &error);
            else closest_of(g, EIGHT / 2, x + at, w + at, parts * m, lanes, by, low, shifted, &rows, &error);
            store(least + at, error, lanes);
            store((float *)word + at, (vec)rows, lanes);
        }
    }
}

/* What rows.judge sums up: w · v · x and w · v² of sub-blocks with these rows; word [parts, m], a and b [m]. */
void judge(int64_t parts, int64_t m, const grid *g, const float *x, const float *w, const int32_t *word, float *a,
           float *b) {
    for (int64_t r = 0; r < m; r += LANES) {
        const int64_t lanes = m - r;
        vec wvx = {0}, wvv = {0};
        for (int64_t p = 0; p < parts; p++) {
            const ivec rows = (ivec)load((const float *)word + p * m + r, lanes);
            const vec low = g->low + pick(rows < g->down, all(g->delta), all(-g->delta));
            for (int i = 0; i < g->group; i++) {
                const int64_t at = (i * parts + p) * m + r;
                const vec v = low + g->step * steps_up(g, rows, i), wv = load(w + at, lanes) * v;
                wvx += wv * load(x + at, lanes);
                wvv += wv * v;
            }
        }
        store(a + r, wvx, lanes);
        store(b + r, wvv, lanes);
    }
}

/* rows.fold_signs: x, w and sizes [EIGHT, m], bits [m]. */
void fold_signs(int64_t m, int32_t even, const float *x, const float *w, float *sizes, int32_t *bits) {
    for (int64_t r = 0; r < m; r += LANES) {
        const int64_t lanes = m - r;
        vec own[EIGHT], least = all(0);
        ivec odd = {0}, cheapest = {0}, signs = {0};
        for (int i = 0; i < EIGHT; i++) {
            const vec given = load(x + i * m + r, lanes);
            const ivec negative = given < 0.0f;
            own[i] = absolute(given);
            odd ^= negative;
            signs |= negative & all_int(1 << i);
            const vec cost = load(w + i * m + r, lanes) * own[i];
            const ivec better = i ? cost < least : all_int(-1);
            least = pick(better, cost, least);
            cheapest = pick_int(better, all_int(i), cheapest);
        }
        for (int i = 0; i < EIGHT; i++) {
            const ivec flip = even ? odd & (cheapest == i) : all_int(0);
            signs ^= flip & all_int(1 << i);
            store(sizes + i * m + r, pick(flip, -own[i], own[i]), lanes);
        }
        store((float *)bits + r, (vec)signs, lanes);
    }
}
