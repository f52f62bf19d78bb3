"""Tiles: the innermost loops of the CPU kernels, written out so that their sums stay in registers.

A compiler keeps an array of sums in registers only where it can see through every index; names
cannot be missed. Multiply-adds of an AVX2 core (Zen 3, gcc 12, one thread, 100 GFLOP/s at most):
6 broadcast numbers x 2 vectors 97-100, 5 x 2 97-99, 4 x 3 71, 4 x 2 65, 12 x 1 87, 8 x 1 79. Dot
products of rows as they lie, whose vectors run along the sum: 1 token x 8 rows 80, 3 x 4 48,
2 x 4 51. Hence ``spread`` and ``outer`` where there is arithmetic to do, ``dots`` where memory
bounds.
"""

from __future__ import annotations


def dots(tokens: int, rows: int) -> str:
    """``out[t * rows + r] = x[t] . w[r]`` over ``n`` numbers: one pass over the rows as they lie.

    Args:
        rows: a multiple of four, whose sums are reduced together.
    """
    each = [(t, r) for t in range(tokens) for r in range(rows)]
    lines = [
        f"INLINE void dots_{tokens}x{rows}(const float *const *x, const weight_t *const *w,",
        "                     int64_t n, float *out) {",
        _declare("const float", {f"*x{t}": f"x[{t}]" for t in range(tokens)}),
        _declare("const weight_t", {f"*w{r}": f"w[{r}]" for r in range(rows)}),
        _declare("vec", {f"s{t}{r}": "{0}" for t, r in each}),
        "    int64_t k = 0;",
        "    for (; k + LANES <= n; k += LANES) {",
        "    " + _declare("vec", {f"v{t}": f"at(x{t} + k)" for t in range(tokens)}),
        "        vec b;",
    ]
    for r in range(rows):
        sums = " ".join(f"s{t}{r} += v{t} * b;" for t in range(tokens))
        lines.append(f"        b = weights(w{r} + k); KEEP(b); {sums}")
    lines.append("    }")
    for t in range(tokens):
        for r in range(0, rows, 4):
            four = ", ".join(f"s{t}{i}" for i in range(r, r + 4))
            lines.append(f"    totals({four}, out + {t * rows + r});")
    lines.append("    for (; k < n; k++) {")
    lines += [f"        out[{t * rows + r}] += x{t}[k] * weight(w{r} + k);" for t, r in each]
    return "\n".join([*lines, "    }", "}", ""])


def spread(rows: int, vectors: int) -> str:
    """``out[r][...] (+)= sum over k of w[r][k] * panel[k][...]``: tokens lie side by side.

    Args:
        vectors: of tokens; a panel has that many times LANES, as has a row of ``out``.
    """
    each = [(r, v) for r in range(rows) for v in range(vectors)]
    width = f"{vectors} * LANES"
    lines = [
        f"static void spread_{rows}x{vectors}(const float *panel, const weight_t *const *w,",
        "                        int64_t n, int64_t ahead, float *out, int more) {",
        _declare("const weight_t", {f"*w{r}": f"w[{r}]" for r in range(rows)}),
        _declare("vec", {f"s{r}{v}": "{0}" for r, v in each}),
        "    for (int64_t k = 0; k < n;) {",
        "        /* one cache line of every row */",
        "        const int64_t stop = MIN(n, k + 64 / (int64_t)sizeof(weight_t));",
        *[f"        __builtin_prefetch(w{r} + k + ahead);" for r in range(rows)],
        f"        for (; k < stop; k++, panel += {width}) {{",
        "        " + _declare("vec", {f"b{v}": f"at(panel + {v} * LANES)" for v in range(vectors)}),
        *[f"            KEEP(b{v});" for v in range(vectors)],
        "            vec c;",
    ]
    for r in range(rows):
        sums = " ".join(f"s{r}{v} += c * b{v};" for v in range(vectors))
        lines.append(f"            c = every(weight(w{r} + k)); {sums}")
    lines.append("        }")
    lines += ["    }", "    if (more) {"]
    place = {(r, v): f"out + {r} * {width} + {v} * LANES" for r, v in each}
    lines += [f"        s{r}{v} += at({place[r, v]});" for r, v in each]
    lines.append("    }")
    lines += [f"    put({place[r, v]}, s{r}{v});" for r, v in each]
    return "\n".join([*lines, "}", ""])


def outer(tokens: int, vectors: int) -> str:
    """``y[t] += sum over n of h[j][t] * tile[j]`` over ``vectors`` vectors of columns.

    ``h`` holds the tokens of a panel side by side, ``ldh`` of them.
    """
    each = [(t, v) for t in range(tokens) for v in range(vectors)]
    lines = [
        f"static void outer_{tokens}(float *const *y, const float *h, int64_t ldh,",
        "                    const float *tile, int64_t n) {",
        _declare("float", {f"*y{t}": f"y[{t}]" for t in range(tokens)}),
        _declare("vec", {f"s{t}{v}": f"at(y{t} + {v} * LANES)" for t, v in each}),
        f"    for (int64_t j = 0; j < n; j++, h += ldh, tile += {vectors} * LANES) {{",
        "    " + _declare("vec", {f"b{v}": f"at(tile + {v} * LANES)" for v in range(vectors)}),
        *[f"        KEEP(b{v});" for v in range(vectors)],
        "        vec c;",
    ]
    for t in range(tokens):
        sums = " ".join(f"s{t}{v} += c * b{v};" for v in range(vectors))
        lines.append(f"        c = every(h[{t}]); {sums}")
    lines.append("    }")
    lines += [f"    put(y{t} + {v} * LANES, s{t}{v});" for t, v in each]
    return "\n".join([*lines, "}", ""])


TOTALS = """\
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
#if LANES == 8 && defined(__AVX__)
    typedef float quad __attribute__((vector_size(16), aligned(4), may_alias));
    vec ab = __builtin_ia32_haddps256(a, b), cd = __builtin_ia32_haddps256(c, d);
    vec s = __builtin_ia32_haddps256(ab, cd);
    *(quad *)out = __builtin_shufflevector(s, s, 0, 1, 2, 3)
        + __builtin_shufflevector(s, s, 4, 5, 6, 7);
#else
    out[0] = total(a); out[1] = total(b); out[2] = total(c); out[3] = total(d);
#endif
}
"""


def _declare(kind: str, values: dict[str, str]) -> str:
    return f"    {kind} {', '.join(f'{name} = {value}' for name, value in values.items())};"
