/* The routed feed-forward layer. Weights as the module keeps them: one neuron per row of up, gate
 * and down (N, m, D), expert after expert, so what a token does not use is never read.
 *
 *   few      a handful of tokens: bound by memory. Every thread takes a share of the live neurons,
 *            reads each of its rows once for all tokens, and adds to sums of its own.
 *   prefill  many tokens: bound by arithmetic. First the neurons of all live (token, expert) pairs,
 *            then the outputs, in strips of columns that threads own: no sum is shared, so the
 *            result does not depend on the number of threads.
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
    int64_t pairs = 0;
    for (int64_t e = 0; e < a->N; e++) {
        first[e] = pairs;
        for (int64_t t = 0; t < a->T; t++)
            if (a->select[t * a->N + e] != 0.0f) token[pairs++] = (int32_t)t;
    }
    first[a->N] = pairs;
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

/* ---------------------------------------------------------------- many tokens */

#define SIDE (2 * LANES) /* tokens side by side */
#define DEPTH 1024        /* input features at a time: SIDE tokens of them stay in the first cache */
#define GROUP 6          /* weight rows of a tile */
#define PANEL 60         /* neurons of one item of work, at most */
#define COLUMNS 64        /* of one strip of outputs */
#define RUN 48           /* neurons whose strip of down stays in the first cache */
#define AHEAD 16         /* rows of down whose strip is fetched before its turn */

/* select from scores, tokens shared out over the threads */
int64_t routes(ffn *a)
{
    int64_t T = a->T;
#pragma omp parallel num_threads((int)a->threads)
    {
        int64_t id = omp_get_thread_num(), n = omp_get_num_threads();
        ffn part = *a;
        part.T = T * (id + 1) / n - T * id / n;
        part.select += T * id / n * a->N;
        part.scores += T * id / n * a->R;
        choose(&part);
    }
    return 0;
}

/* panel (depth, wide): x of n tokens side by side, zeros beside them */
static void side_by_side(const ffn *a, const int32_t *token, int64_t n, int64_t wide, int64_t k, int64_t depth, float *panel)
{
    for (int64_t t0 = 0; t0 < wide; t0 += LANES) {
        const float *x[LANES];
        static const float zeros[DEPTH + DEPTH / 2];
        for (int64_t t = 0; t < LANES; t++) x[t] = t0 + t < n ? a->x + token[t0 + t] * a->D + k : zeros;
        int64_t j = 0;
#if LANES == 8
        for (; j + 8 <= depth; j += 8) {
            vec r[8], s[8];
            for (int i = 0; i < 8; i++) r[i] = at(x[i] + j);
            for (int i = 0; i < 8; i += 2) {
                s[i] = __builtin_shufflevector(r[i], r[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
                s[i + 1] = __builtin_shufflevector(r[i], r[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
            }
            for (int i = 0; i < 8; i += 4)
                for (int q = 0; q < 2; q++) {
                    r[i + 2 * q] = __builtin_shufflevector(s[i + q], s[i + q + 2], 0, 1, 8, 9, 4, 5, 12, 13);
                    r[i + 2 * q + 1] = __builtin_shufflevector(s[i + q], s[i + q + 2], 2, 3, 10, 11, 6, 7, 14, 15);
                }
            for (int i = 0; i < 4; i++) {
                put(panel + (j + i) * wide + t0, __builtin_shufflevector(r[i], r[i + 4], 0, 1, 2, 3, 8, 9, 10, 11));
                put(panel + (j + i + 4) * wide + t0, __builtin_shufflevector(r[i], r[i + 4], 4, 5, 6, 7, 12, 13, 14, 15));
            }
        }
#endif
        for (; j < depth; j++)
            for (int64_t t = 0; t < LANES; t++) panel[j * wide + t0 + t] = x[t][j];
    }
}

/* sums (rows, wide) of the neurons row .. row + size over depth features from k on */
static void sums_of(const ffn *a, const float *panel, int64_t wide, int64_t row, int64_t size, int64_t k, int64_t depth, float *sums)
{
    int64_t per = GATED ? 2 : 1, step = wide == SIDE ? GROUP : 2 * GROUP;
    for (int64_t r = 0; r < size * per; r += step) {
        const weight_t *w[2 * GROUP];
        for (int64_t i = 0; i < step; i++) { /* past the end: the last row again, not used */
            int64_t q = r + i < size * per ? r + i : size * per - 1, at = (row + q / per) * a->D + k;
            w[i] = (GATED && q % 2 == 0 ? a->gate : a->up) + at;
        }
        if (wide == SIDE) spread_6x2(panel, w, depth, GROUP / per * a->D, sums + r * wide, k > 0);
        else spread_12x1(panel, w, depth, 2 * GROUP / per * a->D, sums + r * wide, k > 0);
    }
}

/* h (size, SIDE) of the tokens of a panel from its sums, times the experts' weights */
static void activate(const ffn *a, const float *sums, const float *share, int64_t wide, int64_t row, int64_t size, float *h)
{
    for (int64_t j = 0; j < size; j++) {
        const float *u = sums + (GATED ? 2 * j + 1 : j) * wide, *g = sums + 2 * j * wide;
        float us = a->up_scale ? a->up_scale[row + j] : 1.0f, gs = a->gate_scale ? a->gate_scale[row + j] : 1.0f;
        float ub = a->up_bias ? a->up_bias[row + j] : 0.0f, gb = a->gate_bias ? a->gate_bias[row + j] : 0.0f;
        float ds = a->down_scale ? a->down_scale[row + j] : 1.0f;
        for (int64_t t = 0; t < wide; t++) {
            float up = u[t] * us + ub, gate = GATED ? g[t] * gs + gb : 0.0f;
            (void)gate;
            h[j * SIDE + t] = ACT(up, gate) * share[t] * ds;
        }
    }
}

/* y of n tokens += h (size, SIDE) times a strip of down */
static void outputs(float *const *y, const float *h, const float *tile, int64_t size, int64_t n)
{
    for (int64_t t = 0, parts = (n + 5) / 6, took; t < n; t += took, parts--) {
        took = (n - t + parts - 1) / parts;
        switch (took) {
        case 6: outer_6(y + t, h + t, SIDE, tile, size); break;
        case 5: outer_5(y + t, h + t, SIDE, tile, size); break;
        case 4: outer_4(y + t, h + t, SIDE, tile, size); break;
        case 3: outer_3(y + t, h + t, SIDE, tile, size); break;
        case 2: outer_2(y + t, h + t, SIDE, tile, size); break;
        default: outer_1(y + t, h + t, SIDE, tile, size);
        }
    }
}

int64_t prefill(ffn *a)
{
    int64_t T = a->T, N = a->N, m = a->m, D = a->D;
    int64_t *first = malloc(sizeof(int64_t) * (N + 1)), *panels = malloc(sizeof(int64_t) * (N + 1));
    int32_t *token = malloc(sizeof(int32_t) * (T * N + 1));
    if (!first || !panels || !token) { free(first); free(panels); free(token); return -1; }
    a->live = group(a, first, token);
    panels[0] = 0; /* of tokens, before each expert */
    for (int64_t e = 0; e < N; e++) panels[e + 1] = panels[e] + (first[e + 1] - first[e] + SIDE - 1) / SIDE;
    /* live pairs only, SIDE at a time: at most SIDE - 1 idle ones per expert */
    float *h = malloc(sizeof(float) * (panels[N] * m * SIDE + 1));
    int failed = !h;
    int64_t count = (m + PANEL - 1) / PANEL, most = ((m + count - 1) / count + 2) / 3 * 3;
    int64_t strips = (D + COLUMNS - 1) / COLUMNS;
#pragma omp parallel num_threads((int)a->threads)
    {
        float *panel = malloc(sizeof(float) * ((DEPTH + DEPTH / 2) * SIDE + (2 * PANEL + 4 * GROUP) * SIDE + RUN * COLUMNS));
        if (!panel) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp barrier
        float *sums = panel + (DEPTH + DEPTH / 2) * SIDE, *tile = sums + (2 * PANEL + 4 * GROUP) * SIDE;
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < (failed ? 0 : N * count); item++) {
            int64_t e = item / count, j0 = item % count * most, size = MIN(most, m - j0), row = e * m + j0;
            for (int64_t p = first[e]; p < first[e + 1] && size > 0; p += SIDE) {
                int64_t n = MIN(SIDE, first[e + 1] - p), wide = n > LANES ? SIDE : LANES;
                float share[SIDE];
                for (int64_t k = 0, depth; k < D; k += depth) {
                    depth = D - k <= DEPTH + DEPTH / 2 ? D - k : DEPTH;
                    side_by_side(a, token + p, n, wide, k, depth, panel);
                    sums_of(a, panel, wide, row, size, k, depth, sums);
                }
                for (int64_t t = 0; t < wide; t++) share[t] = t < n ? a->select[token[p + t] * N + e] : 0.0f;
                int64_t at = panels[e] + (p - first[e]) / SIDE;
                activate(a, sums, share, wide, row, size, h + (at * m + j0) * SIDE);
            }
        }
#pragma omp for schedule(dynamic)
        for (int64_t s = 0; s < (failed ? 0 : strips); s++) {
            int64_t c = s * COLUMNS, wide = MIN(COLUMNS, D - c);
            for (int64_t t = 0; t < T; t++)
                for (int64_t k = 0; k < wide; k++) a->y[t * D + c + k] = a->down_bias ? a->down_bias[c + k] : 0.0f;
            for (int64_t e = 0; e < N; e++)
                for (int64_t j0 = 0; j0 < m && first[e + 1] > first[e]; j0 += RUN) {
                    int64_t size = MIN(RUN, m - j0);
                    for (int64_t j = 0; j < size; j++) { /* strips of SIDE columns, one after the other */
                        const weight_t *from = a->down + (e * m + j0 + j) * D + c;
                        int64_t k = 0;
                        for (; k + LANES <= wide; k += LANES) {
                            __builtin_prefetch(from + k + AHEAD * D);
                            put(tile + k / SIDE * (RUN * SIDE) + j * SIDE + k % SIDE, weights(from + k));
                        }
                        for (; k < wide; k++) tile[k / SIDE * (RUN * SIDE) + j * SIDE + k % SIDE] = weight(from + k);
                    }
                    for (int64_t p = first[e]; p < first[e + 1]; p += SIDE) {
                        int64_t n = MIN(SIDE, first[e + 1] - p);
                        const float *mine = h + ((panels[e] + (p - first[e]) / SIDE) * m + j0) * SIDE;
                        for (int64_t b = 0; b < wide; b += SIDE) {
                            float *y[SIDE];
                            const float *part = tile + b * RUN;
                            for (int64_t t = 0; t < n; t++) y[t] = a->y + token[p + t] * D + c + b;
                            if (wide - b >= SIDE) { outputs(y, mine, part, size, n); continue; }
                            for (int64_t j = 0; j < size; j++)
                                for (int64_t t = 0; t < n; t++)
                                    for (int64_t k = 0; k < wide - b; k++) y[t][k] += mine[j * SIDE + t] * part[j * SIDE + k];
                        }
                    }
                }
        }
        free(panel);
    }
    free(first); free(panels); free(token); free(h);
    return failed ? -1 : 0;
}
