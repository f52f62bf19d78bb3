/* Operators for ONNX Runtime: their inputs found and checked, and a kernel called.
 *
 * Above: call.h, ort_api.h, NAMES of the operators, and their KERNELS(lanes), in order.
 */
#include <stdio.h>
#include <stdlib.h>

#define MIN(a, b) ((a) < (b) ? (a) : (b))

typedef struct {
    custom_op base; /* first: ONNX Runtime knows no more */
    const char *name;
    kernel run;
} named_op;

typedef struct {
    ort_table api;
    kernel run;
    int64_t N, m, team;
} state;

#define TRY(...) do { void *status_ = (__VA_ARGS__); if (status_) return status_; } while (0)

static void *op_create(const custom_op *op, ort_table api, const void *info, void **made)
{
    state s = {api, ((const named_op *)op)->run, 0, 0, 4};
    TRY(get_int64(api, info, "experts", &s.N));
    TRY(get_int64(api, info, "neurons", &s.m));
    if (s.N < 1 || s.m < 1) return create_status(api, INVALID_ARGUMENT, "a routed layer needs experts and neurons");
    state *kept = malloc(sizeof s);
    if (!kept) return create_status(api, FAIL, "no memory for a routed layer");
    *kept = s;
    *made = kept;
    return NULL;
}

typedef struct { float *data; int64_t count, sizes[8]; size_t rank; } tensor;

/* count 0 and data NULL where the operator has no such input */
static void *input(ort_table api, void *context, size_t place, tensor *found)
{
    void *value = NULL, *info = NULL, *data = NULL;
    size_t count = 0;
    *found = (tensor){0};
    TRY(get_input(api, context, place, &value));
    if (!value) return NULL;
    TRY(tensor_data(api, value, &data));
    TRY(tensor_shape(api, value, &info));
    void *status = element_count(api, info, &count);
    if (!status) status = dimension_count(api, info, &found->rank);
    if (!status && found->rank <= 8) status = dimensions(api, info, found->sizes, found->rank);
    release_shape(api, info);
    found->data = data;
    found->count = (int64_t)count;
    return status;
}

typedef struct { ort_table api; void *context; } pool;

static int on_the_pool(void *with, void (*f)(void *, size_t), size_t n, void *data)
{
    pool *p = with;
    void *status = parallel_for(p->api, p->context, f, n, 0, data);
    if (status) release_status(p->api, status);
    return status != NULL;
}

static void *op_compute(void *kept, void *context)
{
    state *s = kept;
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
    int64_t wanted[INPUTS] = {T * D, T * s->N, F * D, F * D, F * D, F, F, D, s->N * D, T * R, R * D};
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

static ort_table known; /* for callbacks that are not told */

/* the output is of the input's shape */
static void *op_infer(const custom_op *op, void *inference)
{
    void *info = NULL;
    (void)op;
    TRY(inferred_input(known, inference, 0, &info));
    return infer_output(known, inference, 0, info);
}

static const char *op_name(const custom_op *op) { return ((const named_op *)op)->name; }
static const char *op_provider(const custom_op *op) { (void)op; return "CPUExecutionProvider"; }
static int op_type(const custom_op *op, size_t i) { (void)op; (void)i; return FLOAT; }
static size_t op_inputs(const custom_op *op) { (void)op; return INPUTS; }
static size_t op_outputs(const custom_op *op) { (void)op; return 1; }
static int op_input_kind(const custom_op *op, size_t i) { (void)op; return i < GATE ? REQUIRED : OPTIONAL; }
static int op_output_kind(const custom_op *op, size_t i) { (void)op; (void)i; return REQUIRED; }
static int op_memory(const custom_op *op, size_t i) { (void)op; (void)i; return DEFAULT_MEMORY; }
static int op_one(const custom_op *op) { (void)op; return 1; }

#define NAMED(text) {.name = text, .base = { \
    .version = API, .name = op_name, .provider = op_provider, .input_type = op_type, .inputs = op_inputs, \
    .output_type = op_type, .outputs = op_outputs, .destroy = free, .input_kind = op_input_kind, \
    .output_kind = op_output_kind, .input_memory = op_memory, .variadic_inputs = op_one, .alike_inputs = op_one, \
    .variadic_outputs = op_one, .alike_outputs = op_one, .create2 = op_create, .compute2 = op_compute, \
    .infer = op_infer, .first_version = op_one, .last_version = op_one}},

static named_op ops[] = {NAMES};
#define COUNT (sizeof ops / sizeof *ops)

#ifndef WIDEST /* tests ask for narrower ones */
#define WIDEST 16
#endif

/* for the widest vectors that this processor has */
static const kernel *fitting(void)
{
    static const kernel any[] = {KERNELS(4)};
#if defined(__x86_64__)
    static const kernel avx2[] = {KERNELS(8)}, avx512[] = {KERNELS(16)};
#define HAS(what) __builtin_cpu_supports(what)
    __builtin_cpu_init();
    if (WIDEST >= 8 && HAS("avx2") && HAS("fma")) {
        if (WIDEST >= 16 && HAS("avx512f") && HAS("avx512bw") && HAS("avx512dq") && HAS("avx512vl")) return avx512;
        return avx2;
    }
#endif
    return any;
}

/* What ONNX Runtime calls when the library is registered, for every session's options. */
__attribute__((visibility("default"))) void *RegisterCustomOps(void *options, const ort_base *base)
{
    static void *domain; /* one for all sessions, and never gone: sessions only point to it */
    ort_table api = base->get(API);
    if (!api) {
        char why[160];
        snprintf(why, sizeof why, "this library of operators needs ONNX Runtime 1.%d or later, not %.40s", API, base->version());
        return create_status(base->get(1), FAIL, why);
    }
    static int busy;
    while (__atomic_exchange_n(&busy, 1, __ATOMIC_ACQUIRE)) {}
    void *status = NULL;
    if (!domain) {
        const kernel *kernels = fitting();
        void *made = NULL;
        known = api;
        status = create_domain(api, "sparsify", &made);
        for (size_t i = 0; i < COUNT && !status; i++) {
            ops[i].run = kernels[i];
            status = domain_add(api, made, ops + i);
        }
        if (!status) domain = made;
    }
    __atomic_store_n(&busy, 0, __ATOMIC_RELEASE);
    return status ? status : add_domain(api, options, domain);
}
