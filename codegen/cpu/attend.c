/* Attention of one query per sequence over its keys and values (decode), for live heads only:
   softmax(q . k * scale, masked) . v. A key/value head none of whose query heads is live is not
   read; what is read is read once for all of its live heads. */

typedef struct {
    int64_t batch, heads, kv_heads, keys, width, out; /* B, H, G, S, d, dv */
    int64_t q_row, q_head;          /* strides, in elements; the last dimension has stride one */
    int64_t k_row, k_head, k_key;
    int64_t v_row, v_head, v_key;
    int64_t m_row, m_head, m_key;   /* of the mask; zero where it is broadcast */
    float scale;
    int mask;                       /* 0 none, 1 bool (true = attend), 2 float32, 3 bfloat16 */
    int safe;                       /* where all keys are masked: 1 = zeros, 0 = NaN */
} routed;

#define KEYS 64

/* exp for x <= 0: x = n ln 2 + r, |r| <= ln 2 / 2; the series of e^r to r^7 / 7!, whose rest is
   below 2^-27; results below 2^-126 are zero */
INLINE vec exponential(vec x) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    vec n = (x * 1.44269504f + magic) - magic;
    vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    vec p = every(1.0f / 5040);
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    ints low = x < -87.0f; /* all ones where true; false for NaN, which stays NaN */
    vec kept = (vec)(~low & (ints)n);
    vec two = (vec)((__builtin_convertvector(kept, ints) + 127) << 23);
    return (vec)(~low & (ints)(p * two));
}

/* scores (n) -> e^(score - max), zero where masked; returns one over their sum, 0 for a safe
   softmax over nothing */
static float softmax(float *s, int64_t n, int safe) {
    float most = -INFINITY, sum = 0;
    for (int64_t j = 0; j < n; j++) most = s[j] > most ? s[j] : most;
    if (most == -INFINITY) {
        int broken = 0;
        for (int64_t j = 0; j < n; j++) {
            broken |= s[j] != s[j];
            s[j] = 0;
        }
        return safe && !broken ? 0 : NAN;
    }
    int64_t j = 0;
    vec sums = {0};
    for (; j + LANES <= n; j += LANES) {
        vec e = exponential(at(s + j) - most);
        put(s + j, e);
        sums += e;
    }
    for (; j < n; j++) sum += s[j] = expf(s[j] - most);
    return 1 / (sum + total(sums));
}

/* keys lo to hi of one key/value head for one query head: scores, scaled and masked */
static void scores(const routed *a, const float *q, const value_t *k, const void *mask,
                   int64_t m, float *s, int64_t lo, int64_t hi) {
    const value_t *row[4];
    int64_t j = lo;
    for (; j + 4 <= hi; j += 4) {
        for (int r = 0; r < 4; r++) row[r] = k + (j + r) * a->k_key;
        dot_rows(4, 0, row, q, a->width, s + j);
    }
    for (; j < hi; j++) {
        row[0] = k + j * a->k_key;
        dot_rows(1, 0, row, q, a->width, s + j);
    }
    for (j = lo; j < hi; j++) s[j] *= a->scale;
    m += lo * a->m_key;
    if (a->mask == 1)
        for (j = lo; j < hi; j++, m += a->m_key)
            s[j] = ((const uint8_t *)mask)[m] ? s[j] : -INFINITY;
    else if (a->mask == 2)
        for (j = lo; j < hi; j++, m += a->m_key) s[j] += ((const float *)mask)[m];
    else if (a->mask == 3)
        for (j = lo; j < hi; j++, m += a->m_key) s[j] += widened(((const uint16_t *)mask)[m]);
}

/* q (B, H, d), k (B, G, S, d), v (B, G, S, dv), select (B, H), mask -> y (B, H, dv). Returns live
   (sequence, head) pairs; -1 = out of memory. */
int64_t routed_attend(const routed *a, const value_t *q, const value_t *k, const value_t *v,
                      const value_t *select, const void *mask, value_t *y, int threads) {
    int64_t B = a->batch, H = a->heads, G = a->kv_heads, S = a->keys, d = a->width, dv = a->out;
    int64_t per = H / G, pairs = 0, live = 0, S_room = (S + 15) / 16 * 16;
    float *room = malloc((B * H * (S_room + d + dv) + B * H) * sizeof(float) + B * H * 8 + 64);
    if (!room) return -1;
    int64_t *head = (int64_t *)room; /* (b, h) of the live ones, in order */
    float *s = (float *)(head + B * H), *wide = s + B * H * S_room, *sums = wide + B * H * d;
    float *over = sums + B * H * dv;
    for (int64_t i = 0; i < B * H; i++)
        if (value(select + i) != 0) head[live++] = i;
    for (int64_t i = 0; i < live; i++) {
        const value_t *mine = q + head[i] / H * a->q_row + head[i] % H * a->q_head;
        for (int64_t j = 0; j < d; j++) wide[i * d + j] = value(mine + j);
        if (!i || head[i] / per != head[i - 1] / per) pairs++;
    }
    memset(y, 0, B * H * dv * sizeof(value_t));
    memset(sums, 0, live * dv * sizeof(float));
    int64_t chunks = (S + KEYS - 1) / KEYS;
    threads = team(threads, pairs * S * (d + dv));
    int64_t strips = pairs < threads && dv >= 64 ? 2 : 1, strip = (dv + strips - 1) / strips;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        /* neighbours in `head` share keys: chunk by chunk, so the second finds them in the cache */
#pragma omp for schedule(static)
        for (int64_t c = 0; c < chunks; c++)
            for (int64_t i = 0; i < live; i++) {
                int64_t b = head[i] / H, h = head[i] % H, hi = MIN((c + 1) * KEYS, S);
                scores(a, wide + i * d, k + b * a->k_row + h / per * a->k_head, mask,
                       b * a->m_row + h * a->m_head, s + i * S_room, c * KEYS, hi);
            }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < live; i++) over[i] = softmax(s + i * S_room, S, a->safe);
#pragma omp for schedule(static)
        for (int64_t g = 0; g < B * G * strips; g++) {
            int64_t group = g / strips, from = g % strips * strip, n = MIN(strip, dv - from);
            const value_t *mine = v + group / G * a->v_row + group % G * a->v_head + from;
            for (int64_t c = 0; c < chunks; c++)
                for (int64_t i = 0; i < live && head[i] / per <= group; i++) {
                    if (head[i] / per != group) continue;
                    const value_t *row[4];
                    float *p = s + i * S_room, *sum = sums + i * dv + from;
                    int64_t j = c * KEYS, hi = MIN(j + KEYS, S);
                    for (; j + 4 <= hi; j += 4) {
                        for (int r = 0; r < 4; r++) row[r] = mine + (j + r) * a->v_key;
                        add_rows(4, 0, row, row, p + j, sum, n);
                    }
                    for (; j < hi; j++) {
                        row[0] = mine + j * a->v_key;
                        add_rows(1, 0, row, row, p + j, sum, n);
                    }
                }
            for (int64_t i = 0; i < live; i++)
                if (head[i] / per == group)
                    for (int64_t j = from; j < from + n; j++)
                        set_value(y + head[i] * dv + j, sums[i * dv + j] * over[i]);
        }
    }
    free(room);
    return live;
}
