/* RoutedFFN: x (..., D), select (..., N) and weights in; y (..., D) out. */
typedef struct {
    ort_table api;
    kernel run;
    int64_t N, m, team;
} layer_state;

static void *layer_create(const custom_op *op, ort_table api, const void *info, void **made)
{
    layer_state s = {api, ((const named_op *)op)->run, 0, 0, 4};
    TRY(get_int64(api, info, "experts", &s.N));
    TRY(get_int64(api, info, "neurons", &s.m));
    if (s.N < 1 || s.m < 1) return create_status(api, INVALID_ARGUMENT, "a routed layer needs experts and neurons");
    layer_state *kept = malloc(sizeof s);
    if (!kept) return create_status(api, FAIL, "no memory for a routed layer");
    *kept = s;
    *made = kept;
    return NULL;
}

static void *layer_compute(void *kept, void *context)
{
    layer_state *s = kept;
    ort_table api = s->api;
    pool p = {api, context};
    int64_t team = __atomic_load_n(&s->team, __ATOMIC_RELAXED);
    call c = {.N = s->N, .m = s->m, .spread = on_the_pool, .with = &p, .team = &team};
    tensor in[INPUTS] = {{0}}, *x = in + X;
    size_t given = 0;
    TRY(input_count(api, context, &given));
    for (size_t i = 0; i < MIN(given, INPUTS); i++) TRY(input(api, context, i, in + i));
    if (x->rank < 1 || x->rank > 8) return create_status(api, INVALID_ARGUMENT, "a routed layer's input has 1 to 8 dimensions");
    int64_t D = c.D = x->sizes[x->rank - 1], T = c.T = D ? x->count / D : 0, F = s->N * s->m;
    int64_t R = c.R = T ? in[SCORES].count / T : 0;
    c.dropped = D ? MIN(in[DROPPED].count / D, s->N) : 0;
    int64_t wanted[INPUTS] = {T * D, T * s->N, F * D, F * D, F * D, F, F, D, c.dropped * D, T * R, R * D};
    for (size_t i = 0; i < INPUTS; i++) {
        c.in[i] = in[i].data;
        if (in[i].count == wanted[i] || (i >= GATE && !in[i].data)) continue;
        char why[120];
        snprintf(why, sizeof why, "input %d of a routed layer has %lld numbers, not %lld", (int)i, (long long)in[i].count, (long long)wanted[i]);
        return create_status(api, INVALID_ARGUMENT, why);
    }
    if (!c.in[SCORES] != !c.in[SLOPES] || R > s->N) return create_status(api, INVALID_ARGUMENT, "a routed layer's scores and slopes do not fit");
    void *y = NULL, *data = NULL;
    TRY(get_output(api, context, 0, x->sizes, x->rank, &y));
    TRY(tensor_data(api, y, &data));
    c.y = data;
    if (T && s->run(&c)) return create_status(api, FAIL, "no memory for a routed layer");
    __atomic_store_n(&s->team, team, __ATOMIC_RELAXED);
    return NULL;
}

/* the output is of the input's shape */
static void *layer_infer(const custom_op *op, void *inference)
{
    void *info = NULL;
    (void)op;
    TRY(inferred_input(known, inference, 0, &info));
    return infer_output(known, inference, 0, info);
}

static size_t layer_inputs(const custom_op *op) { (void)op; return INPUTS; }
static int layer_input_kind(const custom_op *op, size_t i) { (void)op; return i < GATE ? REQUIRED : OPTIONAL; }

#define LAYER(text) OPERATOR(text, .inputs = layer_inputs, .input_kind = layer_input_kind, \
    .create2 = layer_create, .compute2 = layer_compute, .destroy = free, .infer = layer_infer)
