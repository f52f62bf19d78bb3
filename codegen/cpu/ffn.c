/* The routed feed-forward layer. Weights as the module keeps them: one neuron per row of up, gate
 * and down (N, m, D), expert after expert, so what a token does not use is never read.
 *
 *   few      a handful of tokens: bound by memory. Every thread takes a share of the live neurons,
 *            reads each of its rows once for all tokens, and adds to sums of its own.
 *   prefill  many tokens: prefill.c
 *
 * vectors.h and the tiles (tiles.py) are above this text, and so are GATED, THIN and ACT.
 */
typedef struct {
    const float *x;                                  /* (T, D) */
    float *y;                                        /* (T, D) */
    const weight_t *up, *gate, *down;                      /* (N, m, D) */
    const float *up_bias, *gate_bias, *down_bias;    /* (N, m), (N, m), (D,) or NULL */
    const float *up_scale, *gate_scale, *down_scale; /* (N, m) of int8 weights, or NULL */
    const float *router, *router_bias;               /* (R, D), (R,): score here, or NULL */
    const int64_t *order;                            /* (N,): router's unit i is order[i], or NULL */
    const float *dropped, *slopes;                   /* (N, D), (R, D) or NULL */
    const float *centre, *weigh, *offset;            /* THIN: (N*m,) or NULL, (N*m,), (N, D) or NULL */
    float *select;                                   /* (T, N): given, or filled where router is */
    float *scores;                                   /* (T, R) where router is given */
    int64_t T, N, m, D, R, keep;                     /* keep < 0: above the threshold, else the best */
    float threshold, cut;                            /* cut: THIN, of one neuron */
    int64_t threads;
    int64_t live, thin;                              /* out: live pairs; live neurons of them */
} ffn;

#define BLOCK 8   /* neurons whose rows are read together by few() */
#define STRIP 512 /* columns of an output row that stay in the first cache */

/* p += sum of c[i] * row[i], n <= BLOCK rows of D columns */
static void add_block(float *p, const float *c, const weight_t *const *row, int64_t n, int64_t D)
{
    if (n == 8) {
        const weight_t *r0 = row[0], *r1 = row[1], *r2 = row[2], *r3 = row[3];
        const weight_t *r4 = row[4], *r5 = row[5], *r6 = row[6], *r7 = row[7];
        float c0 = c[0], c1 = c[1], c2 = c[2], c3 = c[3], c4 = c[4], c5 = c[5], c6 = c[6], c7 = c[7];
        int64_t k = 0;
        for (; k + LANES <= D; k += LANES) {
            vec a = at(p + k), b;
            a += c0 * weights(r0 + k); b = c1 * weights(r1 + k);
            a += c2 * weights(r2 + k); b += c3 * weights(r3 + k);
            a += c4 * weights(r4 + k); b += c5 * weights(r5 + k);
            a += c6 * weights(r6 + k); b += c7 * weights(r7 + k);
            put(p + k, a + b);
        }
        for (; k < D; k++)
            for (int i = 0; i < 8; i++) p[k] += c[i] * weight(row[i] + k);
        return;
    }
    for (int64_t i = 0; i < n; i++) {
        int64_t k = 0;
        for (; k + LANES <= D; k += LANES) put(p + k, at(p + k) + c[i] * weights(row[i] + k));
        for (; k < D; k++) p[k] += c[i] * weight(row[i] + k);
    }
}

static void add_floats(float *p, float c, const float *row, int64_t D)
{
    for (int64_t k = 0; k < D; k++) p[k] += c * row[k];
}

/* scores of rows lo..hi of the router, for all tokens */
static void score(const ffn *a, int64_t lo, int64_t hi)
{
    for (int64_t t = 0; t < a->T; t++)
        for (int64_t r = lo; r < hi; r++) {
            const float *w = a->router + r * a->D, *x = a->x + t * a->D;
            vec s = {0}, q = {0};
            int64_t k = 0;
            for (; k + 2 * LANES <= a->D; k += 2 * LANES) {
                s += at(x + k) * at(w + k);
                q += at(x + k + LANES) * at(w + k + LANES);
            }
            float all = total(s + q) + (a->router_bias ? a->router_bias[r] : 0.0f);
            for (; k < a->D; k++) all += x[k] * w[k];
            a->scores[t * a->R + r] = all;
        }
}

/* select (T, N) from scores (T, R); the shared units come first */
static void choose(const ffn *a)
{
    int64_t shared = a->N - a->R;
    for (int64_t t = 0; t < a->T; t++) {
        float *out = a->select + t * a->N;
        const float *s = a->scores + t * a->R;
        for (int64_t i = 0; i < a->N; i++) {
            int64_t r = i - shared, at = a->order ? a->order[i] : i;
            int on = r < 0;
            if (r >= 0 && a->keep < 0) on = s[r] > a->threshold;
            if (r >= 0 && a->keep >= 0) { /* ties go to the lower unit */
                int32_t before = 0;
                for (int64_t o = 0; o < r; o++) before += s[o] >= s[r];
                for (int64_t o = r + 1; o < a->R; o++) before += s[o] > s[r];
                on = before < a->keep;
            }
            out[at] = on ? 1.0f : 0.0f;
        }
    }
}

/* live experts in order, with their tokens: first[e] .. first[e + 1] of token */
static int64_t group(const ffn *a, int64_t *first, int32_t *token)
{
    int64_t N = a->N, pairs = 0;
    memset(first, 0, sizeof(int64_t) * (N + 1));
    for (int64_t t = 0; t < a->T; t++)
        for (int64_t e = 0; e < N; e++) first[e] += a->select[t * N + e] != 0.0f;
    for (int64_t e = 0; e < N; e++) {
        int64_t count = first[e];
        first[e] = pairs;
        pairs += count;
    }
    for (int64_t t = 0; t < a->T; t++)
        for (int64_t e = 0; e < N; e++) /* first[e] goes up to where the next expert begins */
            if (a->select[t * N + e] != 0.0f) token[first[e]++] = (int32_t)t;
    for (int64_t e = N; e > 0; e--) first[e] = first[e - 1];
    first[0] = 0;
    return pairs;
}

/* g and u (n, BLOCK) of neurons row .. row + size for n tokens */
static void neurons(const ffn *a, const int32_t *token, int64_t n, int64_t row, int64_t size, float *g, float *u)
{
    int64_t D = a->D;
    for (int64_t j = 0; j < size; j += ROWS) {
        const weight_t *w[4];
        for (int64_t i = 0; i < ROWS; i++) { /* past the end: the last row again, not used */
            int64_t at = (row + (j + i < size ? j + i : size - 1)) * D;
            if (GATED) { w[2 * i] = a->gate + at; w[2 * i + 1] = a->up + at; }
            else w[i] = a->up + at;
        }
        for (int64_t t = 0; t < n;) {
            float out[12];
            int64_t left = n - t, took = left >= 3 ? 3 : left;
            const float *x[3];
            for (int64_t i = 0; i < took; i++) x[i] = a->x + token[t + i] * D;
            if (took == 3) dots_3x4(x, w, D, out);
            else if (took == 2) dots_2x4(x, w, D, out);
            else dots_1x4(x, w, D, out);
            for (int64_t i = 0; i < took; i++, t++)
                for (int64_t r = 0; r < ROWS && j + r < size; r++) {
                    if (GATED) { g[t * BLOCK + j + r] = out[i * 4 + 2 * r]; u[t * BLOCK + j + r] = out[i * 4 + 2 * r + 1]; }
                    else u[t * BLOCK + j + r] = out[i * 4 + r];
                }
        }
    }
    for (int64_t j = 0; j < size; j++) {
        float us = a->up_scale ? a->up_scale[row + j] : 1.0f, gs = a->gate_scale ? a->gate_scale[row + j] : 1.0f;
        float ub = a->up_bias ? a->up_bias[row + j] : 0.0f, gb = a->gate_bias ? a->gate_bias[row + j] : 0.0f;
        if (us == 1.0f && gs == 1.0f && ub == 0.0f && gb == 0.0f) continue;
        for (int64_t t = 0; t < n; t++) {
            u[t * BLOCK + j] = u[t * BLOCK + j] * us + ub;
            if (GATED) g[t * BLOCK + j] = g[t * BLOCK + j] * gs + gb;
        }
    }
}

int64_t few(ffn *a)
{
    int64_t T = a->T, N = a->N, m = a->m, D = a->D, thin = 0;
    int threads = (int)a->threads;
    float *parts = malloc(sizeof(float) * threads * T * D);
    int64_t *first = malloc(sizeof(int64_t) * (N + 1)), *start = malloc(sizeof(int64_t) * (N + 1));
    int32_t *token = malloc(sizeof(int32_t) * (T * N + 1));
    int64_t work = 0;
    if (!parts || !first || !start || !token) { free(parts); free(first); free(start); free(token); return -1; }
#pragma omp parallel num_threads(threads) reduction(+ : thin)
    {
        int64_t id = omp_get_thread_num(), n = omp_get_num_threads();
        if (a->router) {
            score(a, a->R * id / n, a->R * (id + 1) / n);
#pragma omp barrier
        }
#pragma omp single
        {
            if (a->router) choose(a);
            a->live = group(a, first, token);
            for (int64_t e = 0; e < N; e++) { /* neurons of live experts before e */
                start[e] = work;
                if (first[e + 1] > first[e]) work += m;
            }
            start[N] = work;
        }
        float *mine = parts + id * T * D;
        memset(mine, 0, sizeof(float) * T * D);
        int64_t lo = work * id / n, hi = work * (id + 1) / n;
        float g[T * BLOCK], u[T * BLOCK];
        for (int64_t e = 0; e < N; e++) {
            int64_t count = first[e + 1] - first[e];
            if (!count || start[e] + m <= lo || start[e] >= hi) continue;
            int64_t from = lo > start[e] ? lo - start[e] : 0, to = hi < start[e] + m ? hi - start[e] : m;
            const int32_t *who = token + first[e];
            for (int64_t j = from; j < to; j += BLOCK) {
                int64_t size = to - j < BLOCK ? to - j : BLOCK, row = e * m + j;
                neurons(a, who, count, row, size, g, u);
                for (int64_t i = 0; i < count * BLOCK; i++) u[i] = ACT(u[i], g[i]);
                for (int64_t s = 0; s < D; s += STRIP)
                    for (int64_t t = 0; t < count; t++) {
                        float share = a->select[who[t] * N + e], c[BLOCK];
                        const weight_t *rows[BLOCK];
                        int64_t used = 0;
                        for (int64_t i = 0; i < size; i++) {
                            float h = u[t * BLOCK + i];
                            if (THIN) {
                                if (a->centre) h -= a->centre[row + i];
                                if (!(fabsf(h) * a->weigh[row + i] > a->cut)) continue;
                            }
                            c[used] = h * share * (a->down_scale ? a->down_scale[row + i] : 1.0f);
                            rows[used++] = a->down + (row + i) * D + s;
                        }
                        if (!s) thin += used;
                        add_block(mine + who[t] * D + s, c, rows, used, D - s < STRIP ? D - s : STRIP);
                    }
            }
        }
        /* what stands in for dead experts, and THIN's offsets of live ones */
        int64_t shared = N - a->R, at = 0;
        for (int64_t t = 0; t < T; t++)
            for (int64_t e = 0; e < N; e++) {
                float share = a->select[t * N + e];
                const float *row = share == 0.0f ? a->dropped : (THIN ? a->offset : NULL);
                if (row && at++ % n == id) add_floats(mine + t * D, share == 0.0f ? 1.0f : share, row + e * D, D);
                if (share == 0.0f && a->slopes && e >= shared && at++ % n == id)
                    add_floats(mine + t * D, a->scores[t * a->R + e - shared], a->slopes + (e - shared) * D, D);
            }
#pragma omp barrier
        for (int64_t k = T * D * id / n; k < T * D * (id + 1) / n; k++) {
            float s = a->down_bias ? a->down_bias[k % D] : 0.0f;
            for (int64_t i = 0; i < n; i++) s += parts[i * T * D + k];
            a->y[k] = s;
        }
    }
    a->thin = thin;
    free(parts); free(first); free(start); free(token);
    return 0;
}
