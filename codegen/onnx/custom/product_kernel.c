/* y[t] = sum over the rows where x[t] is not zero of x[t][row] * row: what rows.c does for a few
 * tokens, shared out as in layer_kernel.c. One token's threads share its rows, several tokens'
 * the outputs. */
#define SHARES 64
#define RUN_BYTES 65536 /* of a run of rows, at least: reading stops and starts with every run */
#define ALONE_BELOW 32768 /* weights to read: handing out work takes microseconds */

/* rows and values that are not zero (NaN is not); room for whole vectors behind both */
static int64_t not_zero(const float *x, int64_t n, int32_t *row, float *times)
{
    int64_t j = 0, found = 0;
#if LANES == 16 && defined(__AVX512F__)
    __m512i at = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (; j + 16 <= n; j += 16) {
        __m512 v = _mm512_loadu_ps(x + j);
        __mmask16 live = _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_NEQ_UQ);
        found += put_live(live, at, v, row + found, times + found);
        at = _mm512_add_epi32(at, _mm512_set1_epi32(16));
    }
#endif
    for (; j < n; j++) {
        row[found] = (int32_t)j;
        times[found] = x[j];
        found += x[j] != 0.0f;
    }
    return found;
}

typedef struct {
    const work *w;
    float *sums; /* (SHARES, pitch): of one token */
    int64_t pitch, next, least, team;
    char used[SHARES];
} runs;

/* the next run, of `all`; 0 where there is none */
static int taken(runs *s, int64_t all, int64_t *lo, int64_t *hi)
{
    *lo = __atomic_load_n(&s->next, __ATOMIC_RELAXED);
    while (*lo < all) {
        *hi = MIN(all, *lo + MAX(s->least, (all - *lo) / (2 * s->team) / 8 * 8));
        if (__atomic_compare_exchange_n(&s->next, lo, *hi, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) return 1;
    }
    return 0;
}

static void row_share(void *data, size_t place)
{
    runs *s = data;
    const work *w = s->w;
    float *mine = s->sums + (int64_t)place * s->pitch;
    for (int64_t lo, hi; taken(s, w->live[0].n, &lo, &hi);) {
        if (!s->used[place]) memset(mine, 0, sizeof(float) * w->to->out);
        s->used[place] = 1;
        add_list(w->to->matrix, w->to->out, w->live, lo, hi, mine, w->to->out);
    }
}

static void output_share(void *data, size_t place)
{
    runs *s = data;
    for (int64_t lo, hi; taken(s, s->w->to->out, &lo, &hi);) {
        s->used[place] = 1;
        outputs(s->w, lo, hi);
    }
}

#define JOINED(kind, lanes) routed_##kind##_##lanes
#define ENTRY(kind, lanes) JOINED(kind, lanes)

int ENTRY(KIND, LANES)(const call *c)
{
    int64_t T = c->T, D = c->D, out = c->N, room = D + 16, pairs = 0, used = 0;
    routed to = {.matrix = c->in[1], .rows = D, .out = out, .units = D};
    work w = {.to = &to, .y = c->y, .tokens = T};
    runs s = {.w = &w, .pitch = (out + 31) / 16 * 16, .team = MAX(1, *c->team)};
    int32_t *rows = malloc(T * room * (sizeof(int32_t) + sizeof(float)));
    if (!rows) return 1;
    for (int64_t t = 0; t < T; t++) {
        list *l = w.live + t;
        l->row = rows + t * room;
        l->times = (float *)(rows + T * room) + t * room;
        pairs += l->n = not_zero(c->in[0] + t * D, D, l->row, l->times);
    }
    int failed = 0;
    if (pairs * out < ALONE_BELOW) outputs(&w, 0, out);
    else if (T > 1) {
        s.least = 64;
        failed = c->spread(c->with, output_share, SHARES, &s);
    } else {
        s.least = MAX(8, RUN_BYTES / (out * (int64_t)sizeof(float)) / 8 * 8);
        s.sums = aligned_alloc(64, SHARES * s.pitch * sizeof(float));
        failed = !s.sums || c->spread(c->with, row_share, SHARES, &s);
        if (!failed) memset(c->y, 0, out * sizeof(float));
        for (int64_t i = 0; i < SHARES && !failed; i++)
            if (s.used[i])
                for (int64_t j = 0; j < out; j++) c->y[j] += s.sums[i * s.pitch + j];
        free(s.sums);
    }
    for (int64_t i = 0; i < SHARES; i++) used += s.used[i];
    if (used) *c->team = used;
    free(rows);
    return failed;
}
