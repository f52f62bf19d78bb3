/* y[t] = sum over the rows that are live for token t of times * row, + vectors: the rows of a
   transposed weight matrix (in, out) are its input features. One to eight tokens; rows that are
   live for no token are not read, and each token adds its own rows only. Threads share the live rows of
   one token, the outputs of several: rows_threads.c, or whoever else has threads. */

#define MOST 8
#define ROOM 8192 /* sums of all tokens at once, in the first cache: whole rows where possible */
#define BLOCK 131072 /* bytes of rows that several tokens read from the second cache in turn */

typedef struct {
    int64_t n;
    int32_t *row; /* ascending */
    float *times;
} list;

#if LANES == 16 && defined(__AVX512F__)
/* Places and values of the live ones of 16, put close together (whole vectors are written); how many. */
INLINE int64_t put_live(__mmask16 live, __m512i at, __m512 v, int32_t *row, float *times) {
    _mm512_storeu_ps(times, _mm512_maskz_compress_ps(live, v));
    _mm512_storeu_si512(row, _mm512_maskz_compress_epi32(live, at));
    return __builtin_popcount(live);
}
#endif

typedef struct {
    const weight_t *matrix;   /* (rows, out) */
    const value_t *offset;    /* (out) or null */
    const value_t *bias;      /* (out) or null */
    const value_t *dropped;   /* (units, out) or null: added for dead units */
    const float *scale;       /* (rows) or null: a feature's score is |x - centre| * scale */
    const value_t *centre;    /* (rows) or null */
    const float *row_scale;   /* (rows) or null: of int8 weights */
    const int64_t *places;    /* (rows) or null: input feature of every row */
    int64_t rows, out, units;
} routed;

typedef struct {
    const routed *to;
    value_t *y; /* (tokens, out) */
    int64_t tokens;
    list live[MOST], dead[MOST];
} work;

/* Rows in eights: y is read and written once for them all, and the next eight are fetched meanwhile
   (into the second cache: Zen 4, two threads, 50 % live, 8 to 25 % faster on rows of 2 to 32 KiB). */
static void add_list(const weight_t *matrix, int64_t out, const list *l, int64_t from, int64_t to,
                     float *y, int64_t n) {
    const weight_t *row[8], *next[8];
    int64_t i = from;
    for (; i + 8 <= to; i += 8) {
        for (int r = 0; r < 8; r++) {
            row[r] = matrix + l->row[i + r] * out;
            next[r] = matrix + l->row[MIN(i + 8 + r, l->n - 1)] * out;
        }
        add_rows(8, 1, row, next, l->times + i, y, n);
    }
    for (; i + 2 <= to; i += 2) {
        for (int r = 0; r < 2; r++) row[r] = matrix + l->row[i + r] * out;
        add_rows(2, 0, row, row, l->times + i, y, n);
    }
    if (i < to) {
        row[0] = matrix + l->row[i] * out;
        add_rows(1, 0, row, row, l->times + i, y, n);
    }
}

/* outputs lo to hi of all tokens */
static void outputs(const work *w, int64_t lo, int64_t hi) {
    const routed *to = w->to;
    float room[ROOM] __attribute__((aligned(64))), *sums[MOST];
    int64_t strip = w->tokens == 1 ? ROOM : ROOM / MOST;
    for (int64_t t = 0; t < w->tokens; t++) sums[t] = room + t * strip;
    for (int64_t start = lo; start < hi; start += strip) {
        int64_t n = MIN(strip, hi - start), from[MOST] = {0};
        int64_t block = to->rows;
        if (w->tokens > 1) {
            block = BLOCK / (n * (int64_t)sizeof(weight_t));
            if (block < 16) block = 16;
        }
        for (int64_t t = 0; t < w->tokens; t++) memset(sums[t], 0, n * sizeof(float));
        for (int64_t end = block; end < to->rows + block; end += block)
            for (int64_t t = 0; t < w->tokens; t++) {
                const list *l = &w->live[t];
                int64_t stop = from[t];
                if (w->tokens == 1) stop = l->n;
                else
                    while (stop < l->n && l->row[stop] < end) stop++;
                add_list(to->matrix + start, to->out, l, from[t], stop, sums[t], n);
                from[t] = stop;
            }
        for (int64_t t = 0; t < w->tokens; t++) {
            float *sum = sums[t];
#ifndef WEIGHT_INT8
            if (to->dropped)
                add_list(to->dropped + start, to->out, &w->dead[t], 0, w->dead[t].n, sum, n);
#endif
            if (to->offset)
                for (int64_t j = 0; j < n; j++) sum[j] += value(to->offset + start + j);
            if (to->bias)
                for (int64_t j = 0; j < n; j++) sum[j] += value(to->bias + start + j);
            value_t *y = w->y + t * to->out + start;
            for (int64_t j = 0; j < n; j++) set_value(y + j, sum[j]);
        }
    }
}
