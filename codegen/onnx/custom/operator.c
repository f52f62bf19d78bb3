/* What operators have in common: inputs found, work shared out, and what ONNX Runtime asks of them.
 *
 * Above: call.h and ort_api.h.
 */
#include <stdio.h>
#include <stdlib.h>

#define MIN(a, b) ((a) < (b) ? (a) : (b))

typedef struct {
    custom_op base; /* first: ONNX Runtime knows no more */
    const char *name;
    kernel run;
} named_op;

#define TRY(...) do { void *status_ = (__VA_ARGS__); if (status_) return status_; } while (0)

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

static ort_table known; /* for callbacks that are not told */

static const char *op_name(const custom_op *op) { return ((const named_op *)op)->name; }
static const char *op_provider(const custom_op *op) { (void)op; return "CPUExecutionProvider"; }
static int op_type(const custom_op *op, size_t i) { (void)op; (void)i; return FLOAT; }
static size_t op_outputs(const custom_op *op) { (void)op; return 1; }
static int op_required(const custom_op *op, size_t i) { (void)op; (void)i; return REQUIRED; }
static int op_memory(const custom_op *op, size_t i) { (void)op; (void)i; return DEFAULT_MEMORY; }
static int op_one(const custom_op *op) { (void)op; return 1; }

#define OPERATOR(text, ...) {.name = text, .base = { \
    .version = API, .name = op_name, .provider = op_provider, .input_type = op_type, .output_type = op_type, \
    .outputs = op_outputs, .output_kind = op_required, .input_memory = op_memory, .variadic_inputs = op_one, \
    .alike_inputs = op_one, .variadic_outputs = op_one, .alike_outputs = op_one, .first_version = op_one, \
    .last_version = op_one, __VA_ARGS__}},
