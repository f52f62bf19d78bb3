/* v stays in a register: gcc folds its load into every use, and then the loads bound the loop */
#if defined(__AVX512F__)
#define KEEP(v) __asm__("" : "+v"(v))
#elif defined(__AVX__)
#define KEEP(v) __asm__("" : "+x"(v))
#else
#define KEEP(v)
#endif
/* the totals of four vectors */
INLINE void totals(vec a, vec b, vec c, vec d, float *out) {
    typedef float quad __attribute__((vector_size(16), aligned(4), may_alias));
#if LANES == 16 && defined(__AVX512F__)
    typedef float eight __attribute__((vector_size(32)));
#define LOW(p, q) __builtin_shufflevector(p, q, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29)
#define HIGH(p, q) __builtin_shufflevector(p, q, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31)
    vec ab = LOW(a, b) + HIGH(a, b), cd = LOW(c, d) + HIGH(c, d); /* a0+a2 b0+b2 a1+a3 b1+b3 ... */
    vec s = __builtin_shufflevector(ab, cd, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29)
        + __builtin_shufflevector(ab, cd, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    eight e = __builtin_shufflevector(s, s, 0, 1, 2, 3, 4, 5, 6, 7)
        + __builtin_shufflevector(s, s, 8, 9, 10, 11, 12, 13, 14, 15);
    *(quad *)out = __builtin_shufflevector(e, e, 0, 1, 2, 3) + __builtin_shufflevector(e, e, 4, 5, 6, 7);
#undef LOW
#undef HIGH
#elif LANES == 8 && defined(__AVX__)
    vec ab = __builtin_ia32_haddps256(a, b), cd = __builtin_ia32_haddps256(c, d);
    vec s = __builtin_ia32_haddps256(ab, cd);
    *(quad *)out = __builtin_shufflevector(s, s, 0, 1, 2, 3)
        + __builtin_shufflevector(s, s, 4, 5, 6, 7);
#else
    out[0] = total(a); out[1] = total(b); out[2] = total(c); out[3] = total(d);
#endif
}
