/* SkippingMatMul: x (..., in) and matrix (in, out); y (..., out), rows of the matrix that only zeros
 * meet not read. For more tokens ONNX Runtime's own product: half live, 576x1536, one thread, 8 tokens
 * took 0.41 ms by rows and 0.35 as one product (1 token 0.13 and 0.24). */
#define MOST_SKIPPING 3

typedef struct {
    ort_table api;
    kernel run;
    void *whole; /* its MatMul */
    int64_t team;
} product_state;

static void *product_create(const custom_op *op, ort_table api, const void *info, void **made)
{
    product_state *s = calloc(1, sizeof *s);
    if (!s) return create_status(api, FAIL, "no memory for a product");
    const char *constraint = "T";
    int type = FLOAT;
    s->api = api;
    s->run = ((const named_op *)op)->run;
    s->team = 4;
    void *status = create_op(api, info, "MatMul", "", 13, &constraint, &type, 1, NULL, 0, 2, 1, &s->whole);
    if (status) free(s);
    else *made = s;
    return status;
}

static void product_destroy(void *kept)
{
    product_state *s = kept;
    release_op(s->api, s->whole);
    free(s);
}

static void *product_compute(void *kept, void *context)
{
    product_state *s = kept;
    ort_table api = s->api;
    tensor x, matrix;
    TRY(input(api, context, 0, &x));
    TRY(input(api, context, 1, &matrix));
    if (x.rank < 1 || x.rank > 8 || matrix.rank != 2 || x.sizes[x.rank - 1] != matrix.sizes[0])
        return create_status(api, INVALID_ARGUMENT, "the sizes of a product's inputs do not fit");
    int64_t D = matrix.sizes[0], out = matrix.sizes[1], T = D ? x.count / D : 0;
    void *y = NULL, *data = NULL;
    x.sizes[x.rank - 1] = out;
    TRY(get_output(api, context, 0, x.sizes, x.rank, &y));
    if (T > MOST_SKIPPING || !D) {
        const void *in[2];
        void *value = NULL;
        for (size_t i = 0; i < 2; i++) {
            TRY(get_input(api, context, i, &value));
            in[i] = value;
        }
        return invoke_op(api, context, s->whole, in, 2, &y, 1);
    }
    TRY(tensor_data(api, y, &data));
    pool p = {api, context};
    int64_t team = __atomic_load_n(&s->team, __ATOMIC_RELAXED);
    call c = {.in = {x.data, matrix.data}, .y = data, .T = T, .D = D, .N = out, .spread = on_the_pool, .with = &p, .team = &team};
    if (T && out && s->run(&c)) return create_status(api, FAIL, "no memory for a product");
    __atomic_store_n(&s->team, team, __ATOMIC_RELAXED);
    return NULL;
}

static size_t product_inputs(const custom_op *op) { (void)op; return 2; }

#define PRODUCT(text) OPERATOR(text, .inputs = product_inputs, .input_kind = op_required, \
    .create2 = product_create, .compute2 = product_compute, .destroy = product_destroy)
