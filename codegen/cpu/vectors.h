/* What all CPU kernels share: vectors of LANES floats (GCC's vector extensions, so one source
   serves AVX-512, AVX2 and NEON), and numbers stored as float32 or bfloat16.

   Set before: LANES; one of VALUE_FLOAT32, VALUE_BFLOAT16 (inputs, outputs, biases, weights);
   WEIGHT_INT8 where the weight matrix is int8 with one float32 scale per row. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h> /* widening: gcc 12 takes vectors of bytes apart one by one */
#endif
#ifdef _OPENMP
#include <omp.h>
#else
#define omp_get_thread_num() 0
#define omp_get_num_threads() 1
#endif

#define INLINE static inline __attribute__((always_inline))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
typedef int8_t bytes __attribute__((vector_size(LANES)));
/* the same in memory: at any address */
typedef float vec_at __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t halves_at __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef int8_t bytes_at __attribute__((vector_size(LANES), aligned(1), may_alias));

INLINE vec at(const float *p) { return *(const vec_at *)p; }
INLINE void put(float *p, vec v) { *(vec_at *)p = v; }
INLINE vec every(float v) { return v - (vec){0}; }

INLINE float total(vec v) {
#if LANES == 16 && defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#endif
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += v[i];
    return sum;
}

/* bfloat16 is the upper half of a float32; rounding goes to the nearest, ties to even */
INLINE float widened(uint16_t h) {
    uint32_t b = (uint32_t)h << 16;
    float f;
    memcpy(&f, &b, 4);
    return f;
}

INLINE uint16_t rounded(float f) {
    uint32_t b;
    memcpy(&b, &f, 4);
    if (f != f) return (uint16_t)(b >> 16 | 0x40);
    return (uint16_t)((b + 0x7fff + (b >> 16 & 1)) >> 16);
}

#ifdef VALUE_BFLOAT16
typedef uint16_t value_t;
INLINE float value(const value_t *p) { return widened(*p); }
INLINE float stored(float f) { return widened(rounded(f)); }
INLINE void set_value(value_t *p, float f) { *p = rounded(f); }
INLINE vec values(const value_t *p) {
#if LANES == 16 && defined(__AVX512F__)
    return (vec)((bits)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)p)) << 16);
#elif LANES == 8 && defined(__AVX2__)
    return (vec)((bits)_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)p)) << 16);
#else
    return (vec)(__builtin_convertvector(*(const halves_at *)p, bits) << 16);
#endif
}
#else
typedef float value_t;
INLINE float value(const value_t *p) { return *p; }
INLINE float stored(float f) { return f; }
INLINE void set_value(value_t *p, float f) { *p = f; }
INLINE vec values(const value_t *p) { return at(p); }
#endif

#ifdef WEIGHT_INT8
typedef int8_t weight_t;
INLINE float weight(const weight_t *p) { return *p; }
INLINE vec weights(const weight_t *p) {
#if LANES == 16 && defined(__AVX512F__)
    return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)p)));
#elif LANES == 8 && defined(__AVX2__)
    return (vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadu_si64(p)));
#else
    return __builtin_convertvector(__builtin_convertvector(*(const bytes_at *)p, ints), vec);
#endif
}
#else
typedef value_t weight_t;
INLINE float weight(const weight_t *p) { return value(p); }
INLINE vec weights(const weight_t *p) { return values(p); }
#endif

/* y (n) += the sum over R <= 8 rows of times[r] * row[r]; with `ahead`, the next ones are fetched
   into the second cache */
INLINE void add_rows(const int R, const int ahead, const weight_t *const *row,
                     const weight_t *const *next, const float *times, float *y, int64_t n) {
    vec c[8];
    for (int r = 0; r < R; r++) c[r] = every(times[r]);
    int64_t j = 0;
    for (; j + 2 * LANES <= n; j += 2 * LANES) {
        vec a = at(y + j), b = at(y + j + LANES);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            if (ahead)
                for (int q = 0; q < 2 * LANES; q += 64 / (int)sizeof(weight_t))
                    __builtin_prefetch(next[r] + j + q, 0, 2);
            a += c[r] * weights(row[r] + j);
            b += c[r] * weights(row[r] + j + LANES);
        }
        put(y + j, a);
        put(y + j + LANES, b);
    }
    for (; j < n; j++) {
        float a = y[j];
        for (int r = 0; r < R; r++) a += times[r] * weight(row[r] + j);
        y[j] = a;
    }
}

#define TOGETHER (LANES == 16 ? 8 : 4) /* rows whose sums fit the registers */

/* dots[r] = row[r] . x for R <= TOGETHER rows of n, x in float32; with `ahead`, rows that lie that
   many numbers further on are fetched into the second cache */
INLINE void dot_rows(const int R, const int64_t ahead, const value_t *const *row, const float *x,
                     int64_t n, float *dots) {
    vec a[TOGETHER] = {{0}}, b[TOGETHER] = {{0}};
    float rest[TOGETHER] = {0};
    int64_t j = 0;
    for (; j + 2 * LANES <= n; j += 2 * LANES) {
        vec u = at(x + j), v = at(x + j + LANES);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            if (ahead)
                for (int q = 0; q < 2 * LANES; q += 64 / (int)sizeof(value_t))
                    __builtin_prefetch(row[r] + ahead + j + q, 0, 2);
            a[r] += u * values(row[r] + j);
            b[r] += v * values(row[r] + j + LANES);
        }
    }
    for (; j < n; j++)
        for (int r = 0; r < R; r++) rest[r] += x[j] * value(row[r] + j);
    for (int r = 0; r < R; r++) dots[r] = total(a[r] + b[r]) + rest[r];
}

/* threads worth starting for that many weights to read: handing out work takes microseconds */
INLINE int team(int threads, int64_t weights_read) {
    return weights_read < 32768 ? 1 : threads;
}
