/* What we use of ONNX Runtime's C interface, as of API version 17 (ONNX Runtime 1.17, 2024).
 *
 * OrtApi is a table of pointers to functions that only grows at its end; the places of ours in it
 * were counted in onnxruntime_c_api.h and tried out on 1.32. Handles are void * here. A status is
 * NULL where all went well. OrtCustomOp is what an operator brings: its members are read up to the
 * API version that it names.
 */
#include <stddef.h>
#include <stdint.h>

#define API 17

typedef const void *const *ort_table;
typedef struct { ort_table (*get)(uint32_t version); const char *(*version)(void); } ort_base;

#define ORT(place, name, head, args, ...) \
    static inline void *name head { return ((void *(*)(__VA_ARGS__))api[place]) args; }

ORT(0, create_status, (ort_table api, int code, const char *text), (code, text), int, const char *)
ORT(26, create_domain, (ort_table api, const char *name, void **made), (name, made), const char *, void **)
ORT(27, domain_add, (ort_table api, void *domain, const void *op), (domain, op), void *, const void *)
ORT(28, add_domain, (ort_table api, void *options, void *domain), (options, domain), void *, void *)
ORT(51, tensor_data, (ort_table api, void *value, void **data), (value, data), void *, void **)
ORT(61, dimension_count, (ort_table api, void *info, size_t *count), (info, count), void *, size_t *)
ORT(62, dimensions, (ort_table api, void *info, int64_t *sizes, size_t count), (info, sizes, count), void *, int64_t *, size_t)
ORT(64, element_count, (ort_table api, void *info, size_t *count), (info, count), void *, size_t *)
ORT(65, tensor_shape, (ort_table api, void *value, void **info), (value, info), void *, void **)
ORT(86, get_int64, (ort_table api, const void *kernel, const char *name, int64_t *found), (kernel, name, found), const void *, const char *, int64_t *)
ORT(88, input_count, (ort_table api, void *context, size_t *count), (context, count), void *, size_t *)
ORT(90, get_input, (ort_table api, void *context, size_t place, void **value), (context, place, value), void *, size_t, void **)
ORT(91, get_output, (ort_table api, void *context, size_t place, const int64_t *sizes, size_t count, void **value), (context, place, sizes, count, value), void *, size_t, const int64_t *, size_t, void **)
ORT(213, create_op, (ort_table api, const void *kernel, const char *name, const char *domain, int version, const char **constraints, const int *types, int constrained, const void *attributes, int count, int inputs, int outputs, void **made), (kernel, name, domain, version, constraints, types, constrained, attributes, count, inputs, outputs, made), const void *, const char *, const char *, int, const char **, const int *, int, const void *, int, int, int, void **)
ORT(214, invoke_op, (ort_table api, void *context, const void *op, const void *const *in, int inputs, void *const *out, int outputs), (context, op, in, inputs, out, outputs), void *, const void *, const void *const *, int, void *const *, int)
ORT(268, inferred_input, (ort_table api, void *inference, size_t place, void **info), (inference, place, info), void *, size_t, void **)
ORT(270, infer_output, (ort_table api, void *inference, size_t place, void *info), (inference, place, info), void *, size_t, void *)
ORT(274, parallel_for, (ort_table api, void *context, void (*f)(void *, size_t), size_t total, size_t batches, void *data), (context, f, total, batches, data), void *, void (*)(void *, size_t), size_t, size_t, void *)
static inline void release_status(ort_table api, void *status) { ((void (*)(void *))api[93])(status); }
static inline void release_op(ort_table api, void *op) { ((void (*)(void *))api[215])(op); }
static inline void release_shape(ort_table api, void *info) { ((void (*)(void *))api[99])(info); }

enum { FAIL = 1, INVALID_ARGUMENT = 2 }; /* codes of a status */
enum { FLOAT = 1, REQUIRED = 0, OPTIONAL = 1, DEFAULT_MEMORY = 0 };

typedef struct custom_op custom_op;
struct custom_op {
    uint32_t version;
    void *(*create)(const custom_op *, ort_table, const void *info);
    const char *(*name)(const custom_op *);
    const char *(*provider)(const custom_op *);
    int (*input_type)(const custom_op *, size_t);
    size_t (*inputs)(const custom_op *);
    int (*output_type)(const custom_op *, size_t);
    size_t (*outputs)(const custom_op *);
    void (*compute)(void *, void *);
    void (*destroy)(void *);
    int (*input_kind)(const custom_op *, size_t);
    int (*output_kind)(const custom_op *, size_t);
    int (*input_memory)(const custom_op *, size_t);
    int (*variadic_inputs)(const custom_op *);
    int (*alike_inputs)(const custom_op *);
    int (*variadic_outputs)(const custom_op *);
    int (*alike_outputs)(const custom_op *);
    void *(*create2)(const custom_op *, ort_table, const void *info, void **kernel); /* 16 */
    void *(*compute2)(void *, void *);
    void *(*infer)(const custom_op *, void *); /* 17 */
    int (*first_version)(const custom_op *);
    int (*last_version)(const custom_op *);
    void *later[4]; /* 18: not ours */
};
