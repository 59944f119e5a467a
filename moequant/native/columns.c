/* Levels, one column after another. */

#include "lanes.h"

/* One column after another is snapped to a level, and what is left of it is felt by the columns behind it. What a
   column wants is in `wanted`; by: levels that 1 of it is. With `weights`, `done` is what those lack of the new
   levels; without, minus what weights move by as their levels change. */
static inline __attribute__((always_inline)) void columns(int64_t n, int64_t rows, const levels *of, const float *matrix,
                                                          int64_t stride, const float *weights, const float *wanted,
                                                          const float *step, const float *by, float *level,
                                                          float *found) {
    vec done[n], sum[STEP];
    for (int64_t r = 0; r < rows; r += LANES) {
        const int64_t lanes = rows - r;
        for (int64_t first = 0; first < n; first += STEP) {
            const int64_t count = n - first < STEP ? n - first : STEP;
            for (int64_t k = 0; k < count; k++) sum[k] = load(wanted + (first + k) * rows + r, lanes);
            add_product(sum, count, matrix + first, stride, done, first); /* what the columns before do to these */
            for (int64_t k = first; k < first + count; k++) {
                const int64_t at = k * rows + r;
                vec goal = sum[k - first];
                for (int64_t j = first; j < k; j++) goal += matrix[j * stride + k] * done[j];
                goal *= load(by + at, lanes);
                if (weights) {
                    const vec near = snap(of, goal);
                    done[k] = load(weights + at, lanes) - near * load(step + at, lanes);
                    store(level + at, near, lanes);
                    store(found + at, done[k], lanes);
                } else {
                    const vec old = load(level + at, lanes), near = snap(of, old + goal);
                    done[k] = (old - near) * load(step + at, lanes);
                    store(level + at, near, lanes);
                    store(found + at, -done[k], lanes);
                }
            }
        }
    }
}

/* columns.walk. unit [n, n] with `stride`; weights, wanted, step, inverse (1/step), level and error [n, rows]. */
void walk(int64_t n, int64_t rows, const levels *of, const float *unit, int64_t stride, const float *weights,
          const float *wanted, const float *step, const float *inverse, float *level, float *error) {
    columns(n, rows, of, unit, stride, weights, wanted, step, inverse, level, error);
}

/* descent.move. hessian [n, n] with `stride`, symmetric; pull (the gradient), step, by (what a gradient of 1 moves a
   level), level and moved (what weights move by) [n, rows]. */
void move(int64_t n, int64_t rows, const levels *of, const float *hessian, int64_t stride, const float *pull,
          const float *step, const float *by, float *level, float *moved) {
    columns(n, rows, of, hessian, stride, NULL, pull, step, by, level, moved);
}
