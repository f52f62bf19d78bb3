/* The library's operators, and how they come into a session.
 *
 * Above: the operators, NAMES of those that are here, and their KERNELS(lanes), in order.
 */
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
