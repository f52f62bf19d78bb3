/* Many tokens: bound by arithmetic. First the neurons of all live (token, expert) pairs, then the
 * outputs, in strips of columns that threads own: no sum is shared between threads, so the result
 * does not depend on their number.
 *
 * Weights come from memory once: while the tiles multiply some rows, they fetch the next ones into
 * the second cache. Only live pairs are computed: an expert's tokens fill vectors, and the few that
 * would leave most of a vector idle are multiplied as they lie (alone).
 */
#define SIDE (2 * LANES)    /* tokens of a panel; columns of a tile of down */
#define BATCH 128           /* tokens of an expert at a time */
#define PANELS 98304        /* floats of their panels, which stay in the second cache; */
#define SPARE (BATCH * LANES) /* and up to so many more, for whole vectors */
#define LDO (BATCH + 16)    /* from row to row of their sums: no power of two */
#define WIDE 8              /* a block of hidden numbers: (neurons, WIDE), of at most OUTER tokens */
#define BLOCKS(n) (((n) + OUTER - 1) / OUTER)
#define MOST 192            /* weight rows of an item of work, at most */
#if defined(WEIGHT_INT8) || defined(VALUE_BFLOAT16)
#define PACKED 1 /* rows are widened once, not once per token */
#else
#define PACKED 0 /* tiles read them as they lie */
#endif
#define SLICE 4096          /* tokens of a call of slice() */
#define COLUMNS (4 * SIDE)  /* of a strip of outputs, at most */
#define SOON 16             /* neurons whose h is asked for before it is written */
#define RUN 128             /* neurons of a tile of down, at most: half of the first cache */

/* Room for floats, in whole cache lines: vectors must not cross their edges. One of a size is kept
 * for the next call: the system would take its pages back, and give new ones one by one. */
typedef struct { size_t bytes; } room;
#define KEPT ((size_t)32 << 20)
static room *kept[16];

static float *take(int64_t place, int64_t count)
{
    size_t bytes = (sizeof(float) * (count > 0 ? count : 1) + 127) / 64 * 64;
    room *found = __atomic_exchange_n(&kept[place % 16], NULL, __ATOMIC_ACQ_REL);
    if (found && found->bytes < bytes) { free(found); found = NULL; }
    if (!found) {
        found = aligned_alloc(64, bytes);
        if (!found) return NULL;
        found->bytes = bytes;
    }
    return (float *)found + 16;
}

static void give_back(int64_t place, float *p)
{
    if (!p) return;
    room *mine = (room *)(p - 16), *none = NULL;
    if (mine->bytes > KEPT || !__atomic_compare_exchange_n(&kept[place % 16], &none, mine, 0, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED))
        free(mine);
}

/* r (LANES rows of LANES) -> its columns, to + i * step */
INLINE void transposed(vec *r, float *to, int64_t step)
{
#if LANES == 16
#define LANE4(p, q, i, j, k, l) __builtin_shufflevector(p, q, 4 * i, 4 * i + 1, 4 * i + 2, 4 * i + 3, \
    4 * j, 4 * j + 1, 4 * j + 2, 4 * j + 3, 4 * k, 4 * k + 1, 4 * k + 2, 4 * k + 3, 4 * l, 4 * l + 1, 4 * l + 2, 4 * l + 3)
#define BOTH(p, q, i, j) __builtin_shufflevector(p, q, i, j, 16 + i, 16 + j, 4 + i, 4 + j, 20 + i, 20 + j, \
    8 + i, 8 + j, 24 + i, 24 + j, 12 + i, 12 + j, 28 + i, 28 + j)
#define MIXED(p, q, o) __builtin_shufflevector(p, q, o, 16 + o, o + 1, 17 + o, 4 + o, 20 + o, 5 + o, 21 + o, \
    8 + o, 24 + o, 9 + o, 25 + o, 12 + o, 28 + o, 13 + o, 29 + o)
    vec s[16];
    for (int i = 0; i < 16; i += 4) { /* in every four rows, fours of columns */
        vec a = MIXED(r[i], r[i + 1], 0), b = MIXED(r[i], r[i + 1], 2);
        vec c = MIXED(r[i + 2], r[i + 3], 0), d = MIXED(r[i + 2], r[i + 3], 2);
        s[i] = BOTH(a, c, 0, 1); s[i + 1] = BOTH(a, c, 2, 3);
        s[i + 2] = BOTH(b, d, 0, 1); s[i + 3] = BOTH(b, d, 2, 3);
    }
    for (int i = 0; i < 4; i++) {
        vec a = LANE4(s[i], s[i + 4], 0, 1, 4, 5), b = LANE4(s[i + 8], s[i + 12], 0, 1, 4, 5);
        vec c = LANE4(s[i], s[i + 4], 2, 3, 6, 7), d = LANE4(s[i + 8], s[i + 12], 2, 3, 6, 7);
        put(to + i * step, LANE4(a, b, 0, 2, 4, 6)); put(to + (i + 4) * step, LANE4(a, b, 1, 3, 5, 7));
        put(to + (i + 8) * step, LANE4(c, d, 0, 2, 4, 6)); put(to + (i + 12) * step, LANE4(c, d, 1, 3, 5, 7));
    }
#elif LANES == 8
    vec s[8];
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
        put(to + i * step, __builtin_shufflevector(r[i], r[i + 4], 0, 1, 2, 3, 8, 9, 10, 11));
        put(to + (i + 4) * step, __builtin_shufflevector(r[i], r[i + 4], 4, 5, 6, 7, 12, 13, 14, 15));
    }
#else
    for (int i = 0; i < LANES; i++)
        for (int t = 0; t < LANES; t++) to[i * step + t] = r[t][i];
#endif
}

/* panel (depth, wide): features k .. k + depth of n tokens side by side, zeros beside them */
static void side_by_side(const ffn *a, const int32_t *token, int64_t n, int64_t wide, int64_t k, int64_t depth, float *panel)
{
    for (int64_t t0 = 0; t0 < wide; t0 += LANES) {
        const float *x[LANES];
        static const float zeros[PANELS / LANES + LANES];
        for (int64_t t = 0; t < LANES; t++) x[t] = t0 + t < n ? a->x + token[t0 + t] * a->D + k : zeros;
        int64_t j = 0;
        for (; j + LANES <= depth; j += LANES) {
            vec r[LANES];
            for (int i = 0; i < LANES; i++) r[i] = at(x[i] + j);
            transposed(r, panel + j * wide + t0, wide);
        }
        for (; j < depth; j++)
            for (int64_t t = 0; t < LANES; t++) panel[j * wide + t0 + t] = x[t][j];
    }
}

/* PACK weight rows of an expert from r on (gate and up in turn), features k on; past the last of
 * `rows`: the last again, not used */
static void group_of(const ffn *a, int64_t neuron, int64_t r, int64_t rows, int64_t k, const weight_t **w)
{
    for (int64_t i = 0; i < PACK; i++) {
        int64_t q = r + i < rows ? r + i : rows - 1;
        w[i] = (GATED && q % 2 == 0 ? a->gate : a->up) + (neuron + (GATED ? q / 2 : q)) * a->D + k;
    }
}

/* n numbers of PACK rows to the buffer, in float32; fetches `next` meanwhile unless it is NULL */
static void pack(const weight_t *const *w, const weight_t *const *next, int64_t n, float *to)
{
    for (int64_t r = 0; r < PACK; r++, to += PITCH) {
        int64_t k = 0;
        for (; k + LANES <= n; k += LANES) {
            if (next) __builtin_prefetch(next[r] + k, 0, 2);
            put(to + k, weights(w[r] + k));
        }
        for (; k < n; k++) to[k] = weight(w[r] + k);
    }
}

/* sums of packed rows and a panel */
static void tile_of(const float *panel, int64_t wide, const float *const *w, int64_t n, const weight_t *const *next, float *out, int more)
{
#if PACK == 8
    if (wide == SIDE) spread_8x2(panel, w, n, next, out, LDO, more);
    else spread_8x1(panel, w, n, next, out, LDO, more);
#else
    if (wide != SIDE) { spread_12x1(panel, w, n, next, out, LDO, more); return; }
    spread_6x2(panel, w, n, next, out, LDO, more);
    spread_6x2(panel, w + 6, n, next ? next + 6 : NULL, out + 6 * LDO, LDO, more);
#endif
}

/* sums of packed rows and n tokens as they lie */
static void alone(const ffn *a, const int32_t *token, int64_t n, int64_t k, const float *const *w, int64_t depth, float *out, int more)
{
    for (int64_t t = 0, took; t < n; t += took) {
        float found[2 * PACK];
        const float *x[2];
        took = MIN(2, n - t);
        for (int64_t i = 0; i < took; i++) x[i] = a->x + token[t + i] * a->D + k;
#if PACK == 8
        if (took == 2) packed_2x8(x, w, depth, found);
        else packed_1x8(x, w, depth, found);
#else
        for (int64_t i = 0; i < took; i++) packed_1x12(x + i, w, depth, found + i * PACK);
#endif
        for (int64_t i = 0; i < took; i++)
            for (int64_t r = 0; r < PACK; r++)
                out[r * LDO + t + i] = found[i * PACK + r] + (more ? out[r * LDO + t + i] : 0.0f);
    }
}

typedef struct { float *panels, *packed, *sums; } desk; /* a thread's own */

/* blocks of hidden numbers, WIDE * m apart, of the neurons from `neuron` on, for n tokens, times
 * the expert's weights */
static void hidden(const ffn *a, const desk *d, const int32_t *token, int64_t n, int64_t e, int64_t neuron, int64_t size, float *h)
{
    int64_t per = GATED ? 2 : 1, rows = size * per, D = a->D;
    int64_t full = n / LANES, rest = n % LANES;
    if (rest > ALONE) { full++; rest = 0; }
    int64_t most = MIN(D, PANELS / (full > 0 ? full * LANES : 1) / LANES * LANES);
    int64_t beside = MIN(n, full * LANES), parts = (D + most - 1) / most;
    int64_t depth = ((D + parts - 1) / parts + LANES - 1) / LANES * LANES;
    for (int64_t k = 0; k < D; k += depth) {
        int64_t deep = MIN(depth, D - k);
        for (int64_t v = 0; v < full; v += 2)
            side_by_side(a, token + v * LANES, MIN(n - v * LANES, SIDE), v + 1 < full ? SIDE : LANES, k, deep, d->panels + v * LANES * depth);
        for (int64_t r = 0; r < rows; r += PACK) {
            const weight_t *w[PACK], *after[PACK] = {NULL}, *const *next = after;
            group_of(a, neuron, r, rows, k, w);
            if (r + PACK < rows) group_of(a, neuron, r + PACK, rows, k, after);
            else if (k + depth < D) group_of(a, neuron, 0, rows, k + depth, after);
            else next = NULL;
            float *sums = d->sums + r * LDO;
            const float *flat[PACK];
            for (int64_t q = 0, n_q; q < deep; q += n_q) { /* what is packed stays in the first cache */
                n_q = PACKED ? MIN(DEPTH, deep - q) : deep;
                int more = k + q > 0;
                if (PACKED) pack(w, full ? NULL : next, n_q, d->packed);
                for (int64_t i = 0; i < PACK; i++) flat[i] = PACKED ? d->packed + i * PITCH : (const float *)w[i];
                for (int64_t v = 0; v < full; v += 2) {
                    int64_t wide = v + 1 < full ? SIDE : LANES;
                    tile_of(d->panels + v * LANES * depth + q * wide, wide, flat, n_q, v ? NULL : next, sums + v * LANES, more);
                }
                if (rest) alone(a, token + beside, rest, k + q, flat, n_q, sums + beside, more);
                for (int64_t i = 0; i < PACK; i++) { w[i] += n_q; after[i] += n_q; }
            }
        }
    }
    float share[BATCH] = {0}, row[BATCH + WIDE];
    int64_t blocks = BLOCKS(n), start[BLOCKS(BATCH)];
    for (int64_t t = 0; t < n; t++) share[t] = a->select[token[t] * a->N + e];
    for (int64_t b = 0; b < blocks; b++) start[b] = n * b / blocks;
    for (int64_t j = 0; j < size; j++) {
        const float *u = d->sums + (GATED ? 2 * j + 1 : j) * LDO, *g = d->sums + 2 * j * LDO;
        int64_t at = neuron + j;
        float us = a->up_scale ? a->up_scale[at] : 1.0f, gs = a->gate_scale ? a->gate_scale[at] : 1.0f;
        float ub = a->up_bias ? a->up_bias[at] : 0.0f, gb = a->gate_bias ? a->gate_bias[at] : 0.0f;
        float ds = a->down_scale ? a->down_scale[at] : 1.0f;
        for (int64_t t = 0; t < n; t += LANES) /* whole vectors: past the last token lies anything */
            for (int64_t i = t; i < t + LANES; i++) {
                float up = u[i] * us + ub, gate = GATED ? g[i] * gs + gb : 0.0f;
                (void)gate;
                row[i] = ACT(up, gate) * share[i] * ds;
            }
        for (int64_t b = 0; b < blocks; b++) { /* what is past a block's tokens is not used */
            float *to = h + (b * a->m + j) * WIDE;
            __builtin_prefetch(to + SOON * WIDE, 1); /* another thread has read it in the last call */
            memcpy(to, row + start[b], sizeof(float) * WIDE);
        }
    }
}

/* y of n <= OUTER tokens += h (size, WIDE) times a tile of down; fetches columns of the next one */
static void outputs(float *const *y, const float *h, const float *tile, int64_t size, int64_t n, const weight_t *next, int64_t D, int64_t ahead)
{
    switch (n) {
#if OUTER == 8
    case 8: outer_8(y, h, WIDE, tile, size, next, D, ahead); break;
    case 7: outer_7(y, h, WIDE, tile, size, next, D, ahead); break;
#endif
    case 6: outer_6(y, h, WIDE, tile, size, next, D, ahead); break;
    case 5: outer_5(y, h, WIDE, tile, size, next, D, ahead); break;
    case 4: outer_4(y, h, WIDE, tile, size, next, D, ahead); break;
    case 3: outer_3(y, h, WIDE, tile, size, next, D, ahead); break;
    case 2: outer_2(y, h, WIDE, tile, size, next, D, ahead); break;
    default: outer_1(y, h, WIDE, tile, size, next, D, ahead);
    }
}

typedef struct { int64_t e, count; float *h; } live; /* an expert, its tokens and blocks of h */

/* columns c .. c + wide of y; strip (T, pitch) and tile are the thread's own */
static void columns(const ffn *a, const live *of, int64_t lives, const int64_t *first, const int32_t *token, int64_t c, int64_t wide, float *strip, float *tile)
{
    int64_t D = a->D, T = a->T, m = a->m, pitch = (wide + SIDE - 1) / SIDE * SIDE;
    int64_t runs = (m + RUN - 1) / RUN, run = ((m + runs - 1) / runs + 7) / 8 * 8; /* alike */
    memset(tile, 0, sizeof(float) * RUN * pitch);
    memset(strip, 0, sizeof(float) * T * pitch);
    if (a->down_bias)
        for (int64_t t = 0; t < T; t++) memcpy(strip + t * pitch, a->down_bias + c, sizeof(float) * wide);
    for (int64_t i = 0; i < lives; i++) {
        int64_t e = of[i].e, n = of[i].count;
        for (int64_t j0 = 0; j0 < m; j0 += run) {
            int64_t size = MIN(run, m - j0);
            const weight_t *from = a->down + (e * m + j0) * D + c, *next = NULL;
            if (j0 + run < m) next = from + run * D;
            else if (i + 1 < lives) next = a->down + of[i + 1].e * m * D + c;
            for (int64_t j = 0; j < size; j++, from += D) { /* SIDE columns of all neurons, then the next */
                int64_t k = 0;
                for (; k + LANES <= wide; k += LANES) put(tile + k / SIDE * (RUN * SIDE) + j * SIDE + k % SIDE, weights(from + k));
                for (; k < wide; k++) tile[k / SIDE * (RUN * SIDE) + j * SIDE + k % SIDE] = weight(from + k);
            }
            for (int64_t p = 0; p < n; p += BATCH) {
                int64_t some = MIN(BATCH, n - p), blocks = BLOCKS(some), start[BLOCKS(BATCH) + 1];
                const int32_t *who = token + first[e] + p;
                const float *h = of[i].h + (p / BATCH * BLOCKS(BATCH) * m + j0) * WIDE;
                float *y[BATCH];
                for (int64_t q = 0; q <= blocks; q++) start[q] = some * q / blocks;
                for (int64_t t = 0; t < some; t++) y[t] = strip + who[t] * pitch;
                for (int64_t b = 0; b < pitch; b += SIDE) {
                    for (int64_t q = 0; q < blocks; q++) {
                        /* half of the next tile's columns with the first block, half with the second */
                        int64_t ahead = !next || p || q > 1 ? 0 : n > OUTER ? LANES : SIDE;
                        outputs(y + start[q], h + q * m * WIDE, tile + b * RUN, size, start[q + 1] - start[q], next + b + (q ? LANES : 0), D, ahead);
                    }
                    for (int64_t t = 0; t < some; t++) y[t] += SIDE;
                }
            }
        }
    }
    for (int64_t t = 0; t < T; t++) memcpy(a->y + t * D + c, strip + t * pitch, sizeof(float) * wide);
}

static int64_t blocks_of(int64_t n) { return n / BATCH * BLOCKS(BATCH) + BLOCKS(n % BATCH); }

/* A slice of tokens: its live experts and their hidden numbers, cut into items of work. */
typedef struct {
    int64_t *first, lives, chunks, each, strips, wide, own;
    int32_t *token;
    live *of;
    float *h;
} plan_of;

static void drop(plan_of *p) { free(p->first); free(p->token); free(p->of); give_back(0, p->h); }

/* 0 where there is no memory. */
static int divide(ffn *a, plan_of *p, int64_t threads)
{
    int64_t T = a->T, N = a->N, m = a->m, D = a->D, lives = 0, size = 0;
    int64_t *first = p->first = malloc(sizeof(int64_t) * (N + 1));
    int32_t *token = p->token = malloc(sizeof(int32_t) * (T * N + 1));
    live *of = p->of = malloc(sizeof(live) * N);
    p->h = NULL;
    if (!first || !token || !of) return 0;
    a->live = group(a, first, token);
    for (int64_t e = 0; e < N; e++) { /* those with most tokens first: the last items are small */
        int64_t count = first[e + 1] - first[e], i = lives;
        if (!count) continue;
        for (; i > 0 && of[i - 1].count < count; i--) of[i] = of[i - 1];
        of[i] = (live){e, count, NULL};
        lives++;
    }
    for (int64_t i = 0; i < lives; i++) size += blocks_of(of[i].count) * m * WIDE;
    p->h = take(0, size);
    if (!p->h) return 0;
    size = 0;
    for (int64_t i = 0; i < lives; i++) {
        of[i].h = p->h + size;
        size += blocks_of(of[i].count) * m * WIDE;
    }
    int64_t per = GATED ? 2 : 1;
    int64_t chunks = (m * per + MOST - 1) / MOST, each = (m + chunks - 1) / chunks;
    int64_t strips = threads * ((D + threads * COLUMNS - 1) / (threads * COLUMNS));
    int64_t wide = ((D + strips - 1) / strips + SIDE - 1) / SIDE * SIDE;
    p->lives = lives;
    p->chunks = chunks;
    p->each = (each + PACK / per - 1) / (PACK / per) * (PACK / per); /* whole groups of rows */
    p->strips = (D + wide - 1) / wide;
    p->wide = wide;
    p->own = MAX(PANELS + SPARE + PACK * PITCH + (MOST + 2 * PACK) * LDO, T * wide + RUN * wide);
    return 1;
}

/* one of lives * chunks items, then one of strips; mine (own) is the thread's */
static void first_item(const ffn *a, const plan_of *p, int64_t item, float *mine)
{
    desk d = {mine, mine + PANELS + SPARE, mine + PANELS + SPARE + PACK * PITCH};
    const live *o = p->of + item / p->chunks;
    int64_t m = a->m, j0 = item % p->chunks * p->each, size = MIN(p->each, m - j0);
    for (int64_t t = 0; t < o->count && size > 0; t += BATCH)
        hidden(a, &d, p->token + p->first[o->e] + t, MIN(BATCH, o->count - t), o->e, o->e * m + j0, size,
               o->h + (t / BATCH * BLOCKS(BATCH) * m + j0) * WIDE);
}

static void second_item(const ffn *a, const plan_of *p, int64_t s, float *mine)
{
    int64_t at = s * p->wide;
    columns(a, p->of, p->lives, p->first, p->token, at, MIN(p->wide, a->D - at), mine, mine + a->T * p->wide);
}
