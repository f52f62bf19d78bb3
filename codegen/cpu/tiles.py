"""Tiles: the innermost loops of the CPU kernels, written out so that their sums stay in registers.

A compiler keeps an array of sums in registers only where it can see through every index; names
cannot be missed. A tile of 3 tokens and 4 weight rows has 12 sums: with the 3 + 1 vectors being
multiplied they fill the 16 registers of AVX2 and read 7 vectors for 12 multiply-adds.
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
        lines.append(f"        b = weights(w{r} + k); {sums}")
    lines.append("    }")
    for t in range(tokens):
        for r in range(0, rows, 4):
            four = ", ".join(f"s{t}{i}" for i in range(r, r + 4))
            lines.append(f"    totals({four}, out + {t * rows + r});")
    lines.append("    for (; k < n; k++) {")
    lines += [f"        out[{t * rows + r}] += x{t}[k] * weight(w{r} + k);" for t, r in each]
    return "\n".join([*lines, "    }", "}", ""])


def outer(tokens: int, vectors: int) -> str:
    """``y[t] += sum over n of h[t * ldh + j] * tile[j]``, for ``vectors`` vectors of columns."""
    each = [(t, v) for t in range(tokens) for v in range(vectors)]
    width = f"{vectors} * LANES"
    ys = ", ".join(f"float *y{t}" for t in range(tokens))
    lines = [
        f"INLINE void outer_{tokens}({ys}, const float *h, int64_t ldh, const float *tile,",
        "                    int64_t n) {",
        _declare("vec", {f"s{t}{v}": f"at(y{t} + {v} * LANES)" for t, v in each}),
        "    for (int64_t j = 0; j < n; j++) {",
        "    "
        + _declare(
            "vec", {f"b{v}": f"at(tile + j * {width} + {v} * LANES)" for v in range(vectors)}
        ),
        "        vec c;",
    ]
    for t in range(tokens):
        sums = " ".join(f"s{t}{v} += c * b{v};" for v in range(vectors))
        lines.append(f"        c = every(h[{t} * ldh + j]); {sums}")
    lines.append("    }")
    lines += [f"    put(y{t} + {v} * LANES, s{t}{v});" for t, v in each]
    return "\n".join([*lines, "}", ""])


TOTALS = """\
/* the totals of four vectors */
INLINE void totals(vec a, vec b, vec c, vec d, float *out) {
#if LANES == 8 && defined(__AVX__)
    typedef float quad __attribute__((vector_size(16), aligned(4), may_alias));
    vec ab = __builtin_ia32_haddps256(a, b), cd = __builtin_ia32_haddps256(c, d);
    vec s = __builtin_ia32_haddps256(ab, cd);
    *(quad *)out = __builtin_shufflevector(s, s, 0, 1, 2, 3) + __builtin_shufflevector(s, s, 4, 5, 6, 7);
#else
    out[0] = total(a); out[1] = total(b); out[2] = total(c); out[3] = total(d);
#endif
}
"""


def _declare(kind: str, values: dict[str, str]) -> str:
    return f"    {kind} {', '.join(f'{name} = {value}' for name, value in values.items())};"
