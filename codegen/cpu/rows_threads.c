/* What torch calls: the sums of rows.c, shared out over OpenMP's threads, for projections whose live
   rows are found here (routed_linears), and for units that are given (routed_columns). */

/* One token: threads share the live rows, whole runs of memory, and add their sums up. Half rows are
   short runs that lie far apart: reading them is slower by a third (rows of 576 floats). */
static int share_rows(const work *w, int threads) {
    const routed *to = w->to;
    const list *l = &w->live[0];
    int64_t out = to->out, room = (out + 15) / 16 * 16 + 16;
    float *sums = aligned_alloc(64, (threads * room * sizeof(float) + 63) / 64 * 64);
    if (!sums) return 0;
#pragma omp parallel num_threads(threads)
    {
        int64_t parts = omp_get_num_threads(), part = omp_get_thread_num();
        float *mine = sums + part * room;
        memset(mine, 0, out * sizeof(float));
        add_list(to->matrix, out, l, l->n * part / parts, l->n * (part + 1) / parts, mine, out);
#ifndef WEIGHT_INT8
        const list *d = &w->dead[0];
        if (to->dropped)
            add_list(to->dropped, out, d, d->n * part / parts, d->n * (part + 1) / parts, mine, out);
#endif
#pragma omp barrier
        for (int64_t j = out * part / parts; j < out * (part + 1) / parts; j++) {
            float sum = 0;
            for (int64_t i = 0; i < parts; i++) sum += sums[i * room + j];
            if (to->offset) sum += value(to->offset + j);
            if (to->bias) sum += value(to->bias + j);
            set_value(w->y + j, sum);
        }
    }
    free(sums);
    return 1;
}

static void share_outputs(const work *w, int64_t pairs, int threads) {
    int64_t out = w->to->out;
    if (w->tokens == 1 && team(threads, pairs * out) > 1 && share_rows(w, threads)) return;
    threads = team(MIN(threads, (int)((out + 63) / 64)), pairs * out);
    if (threads == 1) {
        outputs(w, 0, out);
        return;
    }
#pragma omp parallel num_threads(threads)
    {
        int64_t parts = omp_get_num_threads(), part = omp_get_thread_num();
        int64_t size = ((out + parts - 1) / parts + 15) / 16 * 16; /* whole cache lines */
        int64_t lo = MIN(part * size, out);
        outputs(w, lo, MIN(lo + size, out));
    }
}

/* a score as an integer of the same order; NaN is above all, both zeros are equal: as torch sorts */
INLINE uint32_t rank(float score) {
    uint32_t b;
    if (score != score) return UINT32_MAX;
    score += 0.0f;
    memcpy(&b, &score, 4);
    return b & 0x80000000u ? ~b : b | 0x80000000u;
}

/* the keep-th highest rank, byte by byte; *equal = how many of that rank are kept */
static uint32_t kth(const uint32_t *ranks, int64_t n, int64_t keep, int64_t *equal) {
    uint32_t found = 0, known = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        int64_t count[256] = {0};
        for (int64_t j = 0; j < n; j++) count[ranks[j] >> shift & 255] += (ranks[j] & known) == found;
        int b = 255;
        while (b && count[b] < keep) keep -= count[b--];
        found |= (uint32_t)b << shift;
        known |= 255u << shift;
    }
    *equal = keep;
    return found;
}

/* One projection of x: what is live is decided here. keep: rows = all are live; below, that many of
   the highest score, ties to the lower; -1 = those whose score is above the threshold. */
typedef struct {
    const routed *to;
    value_t *y;    /* (tokens, out) */
    int64_t keep;
    int64_t *counts; /* of the module's work, or null (sparsify/runtime/counters.py) */
    float threshold;
} projection;

/* Counts what was computed: exactly the live pairs. */
static void counted(const projection *p, int64_t tokens, int64_t live) {
    int64_t all = tokens * p->to->rows, add[5] = {tokens, all, live, live, all};
    if (p->counts)
        for (int i = 0; i < 5; i++) __atomic_fetch_add(p->counts + i, add[i], __ATOMIC_RELAXED);
}

/* row and times of those whose score is above the least, of times (n), in place; how many */
static int64_t above(const float *score, float least, int64_t n, int32_t *row, float *times) {
    int64_t j = 0, found = 0;
#if LANES == 16 && defined(__AVX512F__)
    __m512 cut = _mm512_set1_ps(least);
    __m512i at = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (; j + 16 <= n; j += 16) { /* whole vectors are written: up to j + 16, which was read */
        __mmask16 live = _mm512_cmp_ps_mask(_mm512_loadu_ps(score + j), cut, _CMP_GT_OQ);
        __m512 v = _mm512_loadu_ps(times + j);
        found += put_live(live, at, v, row + found, times + found);
        at = _mm512_add_epi32(at, _mm512_set1_epi32(16));
    }
#endif
    for (; j < n; j++) {
        row[found] = (int32_t)j;
        times[found] = times[j];
        found += score[j] > least;
    }
    return found;
}

/* the live rows of one token, x (rows); room for rows numbers */
static void find(const projection *p, const value_t *x, uint32_t *room, list *l) {
    const routed *to = p->to;
    int64_t rows = to->rows, keep = p->keep, n = rows;
    float *times = l->times, *score = (float *)room;
    const value_t *centre = to->centre;
    if (centre)
        for (int64_t j = 0; j < rows; j++) times[j] = stored(value(x + j) - value(centre + j));
    else
        for (int64_t j = 0; j < rows; j++) times[j] = value(x + j);
    if (keep >= rows) {
        for (int64_t j = 0; j < rows; j++) l->row[j] = (int32_t)j;
    } else if (keep < 0) {
        for (int64_t j = 0; j < rows; j++) score[j] = fabsf(times[j]) * to->scale[j];
        n = above(score, p->threshold, rows, l->row, times);
    } else {
        int64_t equal = 0;
        for (int64_t j = 0; j < rows; j++) room[j] = rank(fabsf(times[j]) * to->scale[j]);
        uint32_t least = keep ? kth(room, rows, keep, &equal) : 0;
        n = 0;
        for (int64_t j = 0; j < rows; j++) {
            l->row[n] = (int32_t)j;
            times[n] = times[j];
            n += keep && (room[j] > least || (room[j] == least && equal-- > 0));
        }
    }
    if (to->row_scale)
        for (int64_t i = 0; i < n; i++) times[i] *= to->row_scale[l->row[i]];
    l->n = n;
}

/* Projections of one token. Threads share the live rows of each, whole runs of memory, and add their
   sums up. Half rows are short runs that lie far apart: reading them is slower by a third (rows of
   576 floats). Each thread finds the live rows itself: sooner than it would be told. */
static int of_one(projection *all, int64_t count, const value_t *x, int threads) {
    int64_t rows = 0, weights = 0, room = 0, to_sum = 0;
    for (int64_t i = 0; i < count; i++) {
        const routed *to = all[i].to;
        rows = MAX(rows, to->rows);
        weights += (all[i].keep < 0 ? to->rows : all[i].keep) * to->out;
        to_sum += (to->out + 15) / 16 * 16;
    }
    threads = team(threads, weights);
    rows = (rows + 15) / 16 * 16;
    room = to_sum + 3 * rows + 16; /* sums; places, values and ranks of one projection */
    float *memory = aligned_alloc(64, threads * room * sizeof(float));
    if (!memory) return 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        int64_t parts = omp_get_num_threads(), part = omp_get_thread_num();
        float *mine = memory + part * room, *sums = mine;
        list l = {0, (int32_t *)(mine + to_sum), mine + to_sum + rows};
        for (int64_t i = 0; i < count; i++) {
            const routed *to = all[i].to;
            find(all + i, x, (uint32_t *)(mine + to_sum + 2 * rows), &l);
            memset(sums, 0, to->out * sizeof(float));
            add_list(to->matrix, to->out, &l, l.n * part / parts, l.n * (part + 1) / parts, sums, to->out);
            if (!part) counted(all + i, 1, l.n);
            sums += (to->out + 15) / 16 * 16;
        }
#pragma omp barrier
        sums = memory;
        for (int64_t i = 0; i < count; i++) {
            const routed *to = all[i].to;
            for (int64_t j = to->out * part / parts; j < to->out * (part + 1) / parts; j++) {
                float sum = 0;
                for (int64_t p = 0; p < parts; p++) sum += sums[p * room + j];
                if (to->offset) sum += value(to->offset + j);
                if (to->bias) sum += value(to->bias + j);
                set_value(all[i].y + j, sum);
            }
            sums += (to->out + 15) / 16 * 16;
        }
    }
    free(memory);
    return 1;
}

/* Routed projections of the same x (tokens, rows). 0; -1 = out of memory. */
int64_t routed_linears(projection *all, int64_t count, const value_t *x, int64_t tokens, int threads) {
    if (tokens == 1) return of_one(all, count, x, threads) ? 0 : -1;
    for (int64_t i = 0; i < count; i++) {
        const routed *to = all[i].to;
        int64_t rows = to->rows;
        int32_t *room = malloc((tokens * 8 + 4) * rows + 64);
        if (!room) return -1;
        work w = {.to = to, .y = all[i].y, .tokens = tokens};
        int64_t pairs = 0;
        for (int64_t t = 0; t < tokens; t++) {
            list *l = &w.live[t];
            l->row = room + 2 * t * rows;
            l->times = (float *)(l->row + rows);
            find(all + i, x + t * rows, (uint32_t *)room + 2 * tokens * rows, l);
            pairs += l->n;
        }
        share_outputs(&w, pairs, threads);
        counted(all + i, tokens, pairs);
        free(room);
    }
    return 0;
}

/* Routed columns: z (tokens, rows), select (tokens, units) -> y. Row j belongs to unit
   j / (rows / units). Returns live (token, unit) pairs; -1 = out of memory. */
int64_t routed_columns(const routed *to, const value_t *z, const value_t *select, value_t *y,
                       int64_t tokens, int threads) {
    int64_t rows = to->rows, units = to->units, size = rows / units, pairs = 0;
    int32_t *room = malloc(tokens * 8 * (rows + units) + 64);
    if (!room) return -1;
    work w = {.to = to, .y = y, .tokens = tokens};
    for (int64_t t = 0; t < tokens; t++) {
        list *l = &w.live[t], *d = &w.dead[t];
        l->row = room + 2 * t * (rows + units);
        l->times = (float *)(l->row + rows);
        d->row = l->row + 2 * rows;
        d->times = (float *)(d->row + units);
        for (int64_t u = 0; u < units; u++) {
            float by = value(select + t * units + u);
            if (by == 0) {
                d->row[d->n] = (int32_t)u;
                d->times[d->n++] = 1;
                continue;
            }
            pairs++;
            for (int64_t j = u * size; j < (u + 1) * size; j++) {
                l->row[l->n] = (int32_t)j;
                l->times[l->n++] = by * value(z + t * rows + (to->places ? to->places[j] : j));
            }
        }
    }
    share_outputs(&w, pairs * size, threads);
    free(room);
    return pairs;
}
