/* y[t, place of row] = row . x[t] + bias for the rows of units that are live for token t; zero for
   those of dead units, which are not read. Others (if any) are live for all tokens. Each row is
   read once, for all tokens that want it. Threads share the live units' rows. */

typedef struct {
    const value_t *blocks;     /* (units, size, in) */
    const value_t *bias;       /* (units, size) or null */
    const value_t *others;     /* (n_others, in) or null */
    const value_t *other_bias; /* (n_others) or null */
    const int64_t *places;     /* (units * size + n_others) or null: output of every row */
    int64_t units, size, n_others, in;
} routed;

/* rows `first` to `last` (packed) for the tokens that want them (wants null = all) */
static void some(const routed *to, const float *x, int64_t pitch, value_t *y, int64_t tokens,
                 const uint8_t *wants, int64_t first, int64_t last) {
    int64_t owned = to->units * to->size, out = owned + to->n_others;
    const value_t *row[TOGETHER];
    float dots[TOGETHER];
    for (int64_t p = first; p < last;) {
        int n = last - p >= TOGETHER ? TOGETHER : 1, asked = 0;
        int64_t ahead = last - p >= 2 * TOGETHER ? TOGETHER * to->in : 0; /* those read next */
        int mine = p < owned;
        for (int r = 0; r < n; r++)
            row[r] = mine ? to->blocks + (p + r) * to->in : to->others + (p + r - owned) * to->in;
        for (int64_t t = 0; t < tokens; t++) {
            if (wants && !wants[t]) continue;
            const float *token = x + t * pitch;
            if (n == TOGETHER && ahead && !asked++) dot_rows(TOGETHER, ahead, row, token, to->in, dots);
            else if (n == TOGETHER) dot_rows(TOGETHER, 0, row, token, to->in, dots);
            else dot_rows(1, 0, row, token, to->in, dots);
            for (int r = 0; r < n; r++) {
                const value_t *bias = mine ? to->bias : to->other_bias;
                float b = bias ? value(bias + (mine ? p + r : p + r - owned)) : 0;
                set_value(y + t * out + (to->places ? to->places[p + r] : p + r), dots[r] + b);
            }
        }
        p += n;
    }
}

/* Routed rows: x (tokens, in), select (tokens, units) -> y (tokens, units * size + n_others).
   Returns live (token, unit) pairs; -1 = out of memory. */
int64_t routed_rows(const routed *to, const value_t *x, const value_t *select, value_t *y,
                    int64_t tokens, int threads) {
    int64_t units = to->units, size = to->size, owned = units * size, pairs = 0, used = 0;
    int64_t pitch = (to->in + 15) / 16 * 16; /* tokens begin on cache lines */
    float *wide = aligned_alloc(64, (tokens * pitch * sizeof(float) + units * (8 + tokens) + 127) / 64 * 64);
    if (!wide) return -1;
    int64_t *unit = (int64_t *)(wide + tokens * pitch);
    uint8_t *wants = (uint8_t *)(unit + units); /* (used units, tokens) */
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t j = 0; j < to->in; j++) wide[t * pitch + j] = value(x + t * to->in + j);
    for (int64_t u = 0; u < units; u++) {
        int any = 0;
        for (int64_t t = 0; t < tokens; t++) {
            int live = value(select + t * units + u) != 0;
            wants[used * tokens + t] = (uint8_t)live;
            pairs += live;
            any |= live;
        }
        unit[used] = u;
        used += any;
    }
    if (units) memset(y, 0, tokens * (owned + to->n_others) * sizeof(value_t)); /* others are all written */
    int64_t rows = used * size + to->n_others; /* that are read */
    threads = team(threads, rows * to->in);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        int64_t parts = omp_get_num_threads(), part = omp_get_thread_num();
        int64_t lo = rows * part / parts, hi = rows * (part + 1) / parts;
        for (int64_t i = lo / size; i < used && i * size < hi; i++) {
            int64_t first = lo > i * size ? lo - i * size : 0, last = MIN(size, hi - i * size);
            some(to, wide, pitch, y, tokens, wants + i * tokens, unit[i] * size + first,
                 unit[i] * size + last);
        }
        int64_t first = lo - used * size, last = hi - used * size; /* among the others */
        if (first < 0) first = 0;
        if (first < last) some(to, wide, pitch, y, tokens, NULL, owned + first, owned + last);
    }
    free(wide);
    return pairs;
}

typedef struct {
    const value_t *weight; /* (out, in) */
    const value_t *bias;   /* (out) or null */
    value_t *y;            /* (tokens, out) */
    int64_t out;
} product;

/* Dense products of the same x (tokens, in): y = x @ weight.T + bias. 0; -1 = out of memory. */
int64_t products(const product *all, int64_t count, const value_t *x, int64_t tokens, int64_t in,
                 int threads) {
    int64_t pitch = (in + 15) / 16 * 16, rows = 0;
    float *wide = aligned_alloc(64, (tokens * pitch * sizeof(float) + 63) / 64 * 64);
    if (!wide) return -1;
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t j = 0; j < in; j++) wide[t * pitch + j] = value(x + t * in + j);
    for (int64_t i = 0; i < count; i++) rows += all[i].out;
    threads = team(threads, rows * in);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        int64_t parts = omp_get_num_threads(), part = omp_get_thread_num();
        for (int64_t i = 0; i < count; i++) {
            routed one = {.others = all[i].weight, .other_bias = all[i].bias, .n_others = all[i].out, .in = in};
            int64_t lo = all[i].out * part / parts, hi = all[i].out * (part + 1) / parts;
            some(&one, wide, pitch, all[i].y, tokens, NULL, lo, hi);
        }
    }
    free(wide);
    return 0;
}
