/* A call of an operator, between ONNX Runtime's side (_op.c) and the kernels (_kernel.c). */
#include <stddef.h>
#include <stdint.h>

/* of a routed layer; of a product: x, matrix */
enum { X, SELECT, UP, DOWN, GATE, UP_BIAS, GATE_BIAS, DOWN_BIAS, DROPPED, SCORES, SLOPES, INPUTS };

typedef struct {
    const float *in[INPUTS]; /* NULL where the operator has no such input */
    float *y;
    int64_t T, N, m, D, R; /* of a product: tokens, outputs, -, inputs, - */
    int64_t dropped;       /* experts, the last ones, that have a row of DROPPED */
    /* runs f(data, 0) .. f(data, n - 1), on several threads where there are some; 0 = done */
    int (*spread)(void *with, void (*f)(void *, size_t), size_t n, void *data);
    void *with;
    int64_t *team; /* threads that shared the work of the latest call */
} call;

typedef int kernel_of(const call *); /* 0 = done, else there was no memory */
typedef kernel_of *kernel;
