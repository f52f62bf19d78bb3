/* The routed feed-forward layer. Weights as the module keeps them: one neuron per row of up, gate
 * and down (N, m, D), expert after expert, so what a token does not use is never read.
 *
 *   few      a handful of tokens: bound by memory. Every thread takes a share of the live neurons,
 *            reads each of its rows once for all tokens, and adds to sums of its own.
 *   prefill  many tokens: prefill.c
 *
 * This is what a thread does; ffn_threads.c, or whoever else has threads, shares it out.
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

#define BLOCK 8  /* neurons whose rows of down are read together by few() */
#define CHUNK 32 /* neurons whose gate and up are read before down: longer runs of memory */

/* y[t] += sum of c[t][i] * row[i] over n <= BLOCK rows of D columns, for T tokens; fetches the next
 * BLOCK rows unless NULL */
static void add_block(float *const *y, const float (*c)[BLOCK], int64_t T, const weight_t *const *row, int64_t n, const weight_t *const *next, int64_t D)
{
    int64_t k = 0;
    if (n == BLOCK)
        for (; k + LANES <= D; k += LANES) {
            if (next) for (int i = 0; i < BLOCK; i++) __builtin_prefetch(next[i] + k, 0, 2);
            vec r0 = weights(row[0] + k), r1 = weights(row[1] + k), r2 = weights(row[2] + k), r3 = weights(row[3] + k);
            vec r4 = weights(row[4] + k), r5 = weights(row[5] + k), r6 = weights(row[6] + k), r7 = weights(row[7] + k);
            for (int64_t t = 0; t < T; t++) {
                const float *w = c[t];
                vec a = at(y[t] + k) + w[0] * r0, b = w[1] * r1;
                a += w[2] * r2; b += w[3] * r3;
                a += w[4] * r4; b += w[5] * r5;
                a += w[6] * r6; b += w[7] * r7;
                put(y[t] + k, a + b);
            }
        }
    for (int64_t t = 0; t < T; t++)
        for (int64_t i = 0; i < n; i++) {
            int64_t q = k;
            for (; q + LANES <= D; q += LANES) put(y[t] + q, at(y[t] + q) + c[t][i] * weights(row[i] + q));
            for (; q < D; q++) y[t][q] += c[t][i] * weight(row[i] + q);
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
    int32_t R = (int32_t)a->R, before[R + 1]; /* scores that come before each; ties: the lower unit */
    for (int64_t t = 0; t < a->T; t++) {
        float *out = a->select + t * a->N;
        const float *s = a->scores + t * a->R;
        if (a->keep >= 0) {
            memset(before, 0, sizeof(int32_t) * R);
            for (int32_t o = 0; o < R; o++)
                for (int32_t r = 0; r < R; r++) before[r] += (s[o] > s[r]) | ((s[o] == s[r]) & (o < r));
        }
        for (int64_t i = 0; i < a->N; i++) {
            int64_t r = i - shared;
            int on = r < 0 || (a->keep < 0 ? s[r] > a->threshold : before[r] < a->keep);
            out[a->order ? a->order[i] : i] = on ? 1.0f : 0.0f;
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

/* TILE rows of gate and up, those of ROWS neurons from `row` on; past the last of size: the last
 * again, not used */
static void rows_of(const ffn *a, int64_t row, int64_t size, const weight_t **w)
{
    for (int64_t i = 0; i < ROWS; i++) {
        int64_t at = (row + (i < size ? i : size - 1)) * a->D;
        if (GATED) { w[2 * i] = a->gate + at; w[2 * i + 1] = a->up + at; }
        else w[i] = a->up + at;
    }
}

/* BLOCK rows, as they are fetched ahead: those of gate and up from a neuron on; of down */
static void gate_rows(const ffn *a, int64_t row, int64_t size, const weight_t **w)
{
    for (int64_t i = 0; i < BLOCK; i += TILE) {
        int64_t on = i / TILE * ROWS < size ? i / TILE * ROWS : 0;
        rows_of(a, row + on, size - on, w + i);
    }
}

static void down_rows(const ffn *a, int64_t row, int64_t size, const weight_t **w)
{
    for (int64_t i = 0; i < BLOCK; i++) w[i] = a->down + (row + MIN(i, size - 1)) * a->D;
}

/* g and u (n, CHUNK) of neurons row .. row + size for n tokens; fetches `next` after the last rows */
static void neurons(const ffn *a, const int32_t *token, int64_t n, int64_t row, int64_t size, const weight_t *const *next, float *g, float *u)
{
    int64_t D = a->D;
    for (int64_t j = 0; j < size; j += ROWS) {
        const weight_t *w[TILE], *after[TILE];
        int last = j + ROWS >= size;
        rows_of(a, row + j, size - j, w);
        if (!last) rows_of(a, row + j + ROWS, size - j - ROWS, after);
        for (int64_t t = 0; t < n;) {
            float out[3 * TILE];
            const weight_t *const *soon = t ? NULL : last ? next : after;
            int64_t left = n - t, took = left >= 3 ? 3 : left;
            const float *x[3];
            for (int64_t i = 0; i < took; i++) x[i] = a->x + token[t + i] * D;
#if TILE == 8
            if (took == 3) dots_3x8(x, w, soon, D, out);
            else if (took == 2) dots_2x8(x, w, soon, D, out);
            else dots_1x8(x, w, soon, D, out);
#else
            if (took == 3) dots_3x4(x, w, soon, D, out);
            else if (took == 2) dots_2x4(x, w, soon, D, out);
            else dots_1x4(x, w, soon, D, out);
#endif
            for (int64_t i = 0; i < took; i++, t++)
                for (int64_t r = 0; r < ROWS && j + r < size; r++) {
                    if (GATED) { g[t * CHUNK + j + r] = out[i * TILE + 2 * r]; u[t * CHUNK + j + r] = out[i * TILE + 2 * r + 1]; }
                    else u[t * CHUNK + j + r] = out[i * TILE + r];
                }
        }
    }
    for (int64_t j = 0; j < size; j++) {
        float us = a->up_scale ? a->up_scale[row + j] : 1.0f, gs = a->gate_scale ? a->gate_scale[row + j] : 1.0f;
        float ub = a->up_bias ? a->up_bias[row + j] : 0.0f, gb = a->gate_bias ? a->gate_bias[row + j] : 0.0f;
        if (us == 1.0f && gs == 1.0f && ub == 0.0f && gb == 0.0f) continue;
        for (int64_t t = 0; t < n; t++) {
            u[t * CHUNK + j] = u[t * CHUNK + j] * us + ub;
            if (GATED) g[t * CHUNK + j] = g[t * CHUNK + j] * gs + gb;
        }
    }
}

/* THIN: live neurons of one token whose rows of down are still to be read. */
typedef struct {
    float *y;
    int64_t n;
    const weight_t *row[CHUNK + BLOCK];
    float by[CHUNK + BLOCK];
} pending;

/* Adds what is pending, in blocks; fetches each next block meanwhile, `after` at the last. Less than
 * a block is left for the next time, unless this is the last. */
static void settle(pending *p, const weight_t *const *after, int last, int64_t D)
{
    int64_t i = 0;
    for (; i + BLOCK <= p->n; i += BLOCK) {
        int more = i + 2 * BLOCK <= p->n;
        add_rows(BLOCK, 1, p->row + i, more ? p->row + i + BLOCK : after, p->by + i, p->y, D);
    }
    if (last)
        for (; i < p->n; i++) add_rows(1, 0, p->row + i, p->row + i, p->by + i, p->y, D);
    p->n -= i;
    memmove(p->row, p->row + i, p->n * sizeof *p->row);
    memmove(p->by, p->by + i, p->n * sizeof *p->by);
}

/* The live ones of size neurons from `row` on, of activations h. */
static void keep_live(const ffn *a, int64_t row, int64_t size, const float *h, float share, pending *p)
{
    float v[CHUNK], score[CHUNK];
    for (int64_t i = 0; i < size; i++) {
        v[i] = h[i] - (a->centre ? a->centre[row + i] : 0.0f);
        score[i] = fabsf(v[i]) * a->weigh[row + i];
        v[i] *= share * (a->down_scale ? a->down_scale[row + i] : 1.0f);
    }
    for (int64_t i = 0; i < size; i++) {
        p->row[p->n] = a->down + (row + i) * a->D;
        p->by[p->n] = v[i];
        p->n += score[i] > a->cut;
    }
}

/* What few() knows of the live experts: their tokens (group), and where their neurons begin among
 * all live ones, of which there are `work`. */
typedef struct { int64_t *first, *start, work; int32_t *token; } lives_of;

static void forget(lives_of *p) { free(p->first); free(p->start); free(p->token); }

/* Room for it; 0 where there is none. */
static int room_for(const ffn *a, lives_of *p)
{
    p->first = malloc(sizeof(int64_t) * (a->N + 1));
    p->start = malloc(sizeof(int64_t) * (a->N + 1));
    p->token = malloc(sizeof(int32_t) * (a->T * a->N + 1));
    p->work = 0;
    if (p->first && p->start && p->token) return 1;
    forget(p);
    return 0;
}

static void look(ffn *a, lives_of *p)
{
    a->live = group(a, p->first, p->token);
    for (int64_t e = 0; e < a->N; e++) { /* neurons of live experts before e */
        p->start[e] = p->work;
        if (p->first[e + 1] > p->first[e]) p->work += a->m;
    }
    p->start[a->N] = p->work;
}

/* Adds to mine (T, D) what the live neurons lo to hi give; returns how many of THIN were live. */
static int64_t live_range(const ffn *a, const lives_of *p, int64_t lo, int64_t hi, float *mine)
{
    int64_t T = a->T, N = a->N, m = a->m, D = a->D, thin = 0;
    const int64_t *first = p->first, *start = p->start;
    float g[T * CHUNK], u[T * CHUNK], c[T][BLOCK], *y[T];
    pending left[THIN ? T : 1];
    for (int64_t t = 0; t < (THIN ? T : 1); t++) left[t].n = 0;
    for (int64_t e = 0; e < N; e++) {
        int64_t count = first[e + 1] - first[e];
        if (!count || start[e] + m <= lo || start[e] >= hi) continue;
        int64_t from = lo > start[e] ? lo - start[e] : 0, to = hi < start[e] + m ? hi - start[e] : m;
        const int32_t *who = p->token + first[e];
        for (int64_t t = 0; t < count; t++) y[t] = mine + who[t] * D;
        for (int64_t j = from; j < to; j += CHUNK) {
            int64_t size = to - j < CHUNK ? to - j : CHUNK, row = e * m + j, then = row + CHUNK;
            const weight_t *rows[BLOCK], *after[BLOCK];
            if (j + CHUNK >= to) { /* the next live expert's, or what is read already */
                int64_t o = e + 1;
                while (o < N && first[o + 1] == first[o]) o++;
                then = o < N && start[o] < hi ? o * m : row;
            }
            if (THIN) { /* rows of down are read a chunk later: by then they are known, and fetched */
                pending *q = left + who[0];
                gate_rows(a, then, N * m - then, rows);
                neurons(a, who, count, row, size, q->n >= BLOCK ? q->row : rows, g, u);
                for (int64_t i = 0; i < count * CHUNK; i++) u[i] = ACT(u[i], g[i]);
                for (int64_t t = 0; t < count; t++) {
                    q = left + who[t];
                    q->y = y[t];
                    settle(q, rows, 0, D);
                    int64_t before = q->n;
                    keep_live(a, row, size, u + t * CHUNK, a->select[who[t] * N + e], q);
                    thin += q->n - before;
                }
                continue;
            }
            down_rows(a, row, size, after);
            neurons(a, who, count, row, size, after, g, u);
            for (int64_t i = 0; i < count * CHUNK; i++) u[i] = ACT(u[i], g[i]);
            for (int64_t b = 0; b < size; b += BLOCK) {
                int64_t some = MIN(BLOCK, size - b), at = row + b;
                down_rows(a, at, some, rows);
                if (b + BLOCK < size) down_rows(a, at + BLOCK, size - b - BLOCK, after);
                else gate_rows(a, then, N * m - then, after);
                for (int64_t t = 0; t < count; t++)
                    for (int64_t i = 0; i < some; i++)
                        c[t][i] = u[t * CHUNK + b + i] * a->select[who[t] * N + e]
                                  * (a->down_scale ? a->down_scale[at + i] : 1.0f);
                add_block(y, c, count, rows, some, after, D);
            }
        }
    }
    if (THIN)
        for (int64_t t = 0; t < T; t++)
            if (left[t].n) settle(left + t, left[t].row, 1, D);
    return thin;
}

/* Adds to mine (T, D) every nth part, from `id` on, of what stands in for dead experts, and of
 * THIN's offsets of live ones. */
static void stand_ins(const ffn *a, int64_t id, int64_t n, float *mine)
{
    int64_t T = a->T, N = a->N, D = a->D, shared = N - a->R, at = 0;
    for (int64_t t = 0; t < T; t++)
        for (int64_t e = 0; e < N; e++) {
            float share = a->select[t * N + e];
            const float *row = share == 0.0f ? a->dropped : (THIN ? a->offset : NULL);
            if (row && at++ % n == id) add_floats(mine + t * D, share == 0.0f ? 1.0f : share, row + e * D, D);
            if (share == 0.0f && a->slopes && e >= shared && at++ % n == id)
                add_floats(mine + t * D, a->scores[t * a->R + e - shared], a->slopes + (e - shared) * D, D);
        }
}
