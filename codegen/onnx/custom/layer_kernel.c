/* The parts of ffn.c and prefill.c shared out over the threads of ONNX Runtime, which has its own:
 * others beside them would fight for the cores, as its wait awake.
 *
 * Nobody says how many there are, nor waits for others within a part. So every call of a part takes
 * work until there is none, in runs that get shorter; its sums are its own (a place of SHARES).
 */
#define SHARES 64
#define FEWEST 64   /* neurons of a run */
#define FEW 16       /* tokens, at most, that few_tokens() is faster for */
#define ALONE_BELOW 32768 /* weights to read: handing out work takes microseconds */

typedef struct {
    const ffn *a;
    const lives_of *lives;
    float *sums;
    int64_t next, team;
    char used[SHARES];
} ranges;

static void range_share(void *data, size_t place)
{
    ranges *s = data;
    const ffn *a = s->a;
    float *mine = s->sums + (int64_t)place * a->T * a->D;
    int64_t work = s->lives->work, lo = __atomic_load_n(&s->next, __ATOMIC_RELAXED);
    while (lo < work) {
        int64_t size = MAX(FEWEST, (work - lo) / (2 * s->team) / BLOCK * BLOCK), hi = MIN(work, lo + size);
        if (!__atomic_compare_exchange_n(&s->next, &lo, hi, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) continue;
        if (!s->used[place]) memset(mine, 0, sizeof(float) * a->T * a->D);
        s->used[place] = 1;
        live_range(a, s->lives, lo, hi, mine);
        lo = __atomic_load_n(&s->next, __ATOMIC_RELAXED);
    }
}

/* what stands in for dead experts */
static void add_stand_ins(const ffn *a, const call *c)
{
    int64_t first = a->N - c->dropped;
    for (int64_t t = 0; t < a->T; t++)
        for (int64_t e = first; e < a->N; e++)
            if (a->select[t * a->N + e] == 0.0f)
                add_floats(a->y + t * a->D, 1.0f, c->in[DROPPED] + (e - first) * a->D, a->D);
    stand_ins(a, 0, 1, a->y);
}

static int few_tokens(ffn *a, const call *c)
{
    lives_of lives;
    ranges s = {.a = a, .lives = &lives, .team = MAX(1, *c->team)};
    int64_t n = a->T * a->D, used = 0;
    s.sums = take(0, SHARES * n);
    if (!s.sums || !room_for(a, &lives)) { give_back(0, s.sums); return 1; }
    look(a, &lives);
    int failed = 0;
    if (lives.work * a->D * (GATED ? 3 : 2) < ALONE_BELOW) range_share(&s, 0);
    else failed = c->spread(c->with, range_share, SHARES, &s);
    for (int64_t t = 0; t < a->T; t++)
        for (int64_t k = 0; k < a->D; k++) a->y[t * a->D + k] = a->down_bias ? a->down_bias[k] : 0.0f;
    for (int64_t i = 0; i < SHARES; i++) {
        if (!s.used[i]) continue;
        used++;
        for (int64_t k = 0; k < n; k++) a->y[k] += s.sums[i * n + k];
    }
    add_stand_ins(a, c);
    if (used) *c->team = used;
    give_back(0, s.sums);
    forget(&lives);
    return failed;
}

typedef struct {
    ffn *a;
    const plan_of *plan;
    int64_t next, failed;
} items;

static void first_share(void *data, size_t place)
{
    items *s = data;
    float *mine = NULL;
    for (;;) {
        int64_t item = __atomic_fetch_add(&s->next, 1, __ATOMIC_RELAXED);
        if (item >= s->plan->lives * s->plan->chunks) break;
        if (!mine) mine = take(1 + (int64_t)place, s->plan->own);
        if (!mine) { __atomic_store_n(&s->failed, 1, __ATOMIC_RELAXED); break; }
        first_item(s->a, s->plan, item, mine);
    }
    give_back(1 + (int64_t)place, mine);
}

static void second_share(void *data, size_t place)
{
    items *s = data;
    float *mine = NULL;
    for (;;) {
        int64_t strip = __atomic_fetch_add(&s->next, 1, __ATOMIC_RELAXED);
        if (strip >= s->plan->strips) break;
        if (!mine) mine = take(1 + (int64_t)place, s->plan->own);
        if (!mine) { __atomic_store_n(&s->failed, 1, __ATOMIC_RELAXED); break; }
        second_item(s->a, s->plan, strip, mine);
    }
    give_back(1 + (int64_t)place, mine);
}

static int many_tokens(ffn *a, const call *c)
{
    plan_of plan;
    items s = {.a = a, .plan = &plan};
    int failed = !divide(a, &plan, MAX(1, *c->team));
    if (!failed) failed = c->spread(c->with, first_share, SHARES, &s) || s.failed;
    s.next = 0;
    if (!failed) failed = c->spread(c->with, second_share, SHARES, &s) || s.failed;
    drop(&plan);
    if (!failed) add_stand_ins(a, c);
    return failed;
}

/* what is kept for the next call, when the library goes */
__attribute__((destructor)) static void release(void)
{
    for (int i = 0; i < (int)(sizeof kept / sizeof *kept); i++) free(kept[i]);
}

#define JOINED(kind, lanes) routed_##kind##_##lanes
#define ENTRY(kind, lanes) JOINED(kind, lanes)

int ENTRY(KIND, LANES)(const call *c)
{
    const float *const *in = c->in;
    int64_t most = c->T <= FEW ? FEW : SLICE;
    for (int64_t t = 0; t < c->T; t += most) {
        ffn a = {
            .x = in[X] + t * c->D, .y = c->y + t * c->D, .select = (float *)in[SELECT] + t * c->N,
            .up = in[UP], .gate = in[GATE], .down = in[DOWN], .up_bias = in[UP_BIAS],
            .gate_bias = in[GATE_BIAS], .down_bias = in[DOWN_BIAS],
            .scores = in[SCORES] ? (float *)in[SCORES] + t * c->R : NULL, .slopes = in[SLOPES],
            .T = MIN(most, c->T - t), .N = c->N, .m = c->m, .D = c->D, .R = c->R,
        };
        if (most == FEW ? few_tokens(&a, c) : many_tokens(&a, c)) return 1;
    }
    return 0;
}
