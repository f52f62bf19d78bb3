"""Tiles: the innermost loops of the CPU kernels, written out so that their sums stay in registers.

A compiler keeps an array of sums in registers only where it can see through every index; names
cannot be missed. Where there is arithmetic to do, bfloat16 and int8 weights are first widened into
a buffer (once, not once per token); float32 rows are read as they lie. Rows of a matrix whose width
is a power of two all fall into the same lines of the first cache, which holds eight of them: 12x1,
which AVX2 takes for a single vector of tokens, is slow there.

Multiply-adds of one thread, GFLOP/s (gcc 12):

* AVX2 (Zen 3, at most 100): ``spread`` 6x2 97-100, 5x2 97-99, 4x3 71, 12x1 87, 8x1 79; ``dots``
  1x8 80, 3x4 48, 2x4 51.
* AVX-512 (Zen 4, at most 118): ``spread`` 6x2 to 8x3 112-118, 8x1 105; ``outer`` 6x2 to 8x2 118;
  ``dots`` 2x8 117, 3x8 115, 1x8 95, 6x4 90, on vectors that do not cross cache lines; on others
  20 % less. Rows 8 KiB apart: 12x1 72, 16x1 42.
"""

from __future__ import annotations

FETCH = "        if (next) for (int r = 0; r < {rows}; r++) __builtin_prefetch(next[r] + k, 0, 2);"


def dots(tokens: int, rows: int, packed: bool = False) -> str:
    """``out[t * rows + r] = x[t] . w[r]`` over ``n`` numbers: one pass over the rows as they lie.

    ``next``, unless NULL: the rows that are read after these, fetched meanwhile.

    Args:
        rows: a multiple of four, whose sums are reduced together.
        packed: the rows are float32 whatever the weights are, and nothing is fetched.
    """
    each = [(t, r) for t in range(tokens) for r in range(rows)]
    name = f"{'packed' if packed else 'dots'}_{tokens}x{rows}"
    kind, read = ("float", "") if packed else ("weight_t", "weight")
    following = "" if packed else "const weight_t *const *next, "
    lines = [
        f"static void {name}(const float *const *x, const {kind} *const *w,",
        f"                     {following}int64_t n, float *out) {{",
        _declare("const float", {f"*x{t}": f"x[{t}]" for t in range(tokens)}),
        _declare(f"const {kind}", {f"*w{r}": f"w[{r}]" for r in range(rows)}),
        _declare("vec", {f"s{t}{r}": "{0}" for t, r in each}),
        "    int64_t k = 0;",
        "    for (; k + LANES <= n; k += LANES) {",
        "    " + _declare("vec", {f"v{t}": f"at(x{t} + k)" for t in range(tokens)}),
        "        vec b;",
    ]
    if not packed:
        lines.append(FETCH.format(rows=rows))
    for r in range(rows):
        sums = " ".join(f"s{t}{r} += v{t} * b;" for t in range(tokens))
        vector = f"at(w{r} + k)" if packed else f"weights(w{r} + k)"
        lines.append(f"        b = {vector}; KEEP(b); {sums}")
    lines.append("    }")
    for t in range(tokens):
        for r in range(0, rows, 4):
            four = ", ".join(f"s{t}{i}" for i in range(r, r + 4))
            lines.append(f"    totals({four}, out + {t * rows + r});")
    lines.append("    for (; k < n; k++) {")
    number = "w{r}[k]" if packed else read + "(w{r} + k)"
    lines += [f"        out[{t * rows + r}] += x{t}[k] * {number.format(r=r)};" for t, r in each]
    return "\n".join([*lines, "    }", "}", ""])


def spread(rows: int, vectors: int) -> str:
    """``out[r][...] (+)= sum over k of w[r][k] * panel[k][...]``: tokens lie side by side.

    Rows of ``w`` are float32. ``next``, unless NULL: the rows that are read after these, fetched
    into the second cache meanwhile.

    Args:
        vectors: of tokens; a panel has that many times LANES, rows of ``out`` are ``ldo`` apart.
    """
    each = [(r, v) for r in range(rows) for v in range(vectors)]
    width = f"{vectors} * LANES"
    lines = [
        f"static void spread_{rows}x{vectors}(const float *panel, const float *const *w,",
        "                        int64_t n, const weight_t *const *next, float *out, int64_t ldo,",
        "                        int more) {",
        _declare("const float", {f"*w{r}": f"w[{r}]" for r in range(rows)}),
        _declare("vec", {f"s{r}{v}": "{0}" for r, v in each}),
        "    for (int64_t k = 0; k < n;) {",
        "        /* one cache line of every row */",
        "        const int64_t stop = MIN(n, k + 64 / (int64_t)sizeof(weight_t));",
        FETCH.format(rows=rows),
        f"        for (; k < stop; k++, panel += {width}) {{",
        "        " + _declare("vec", {f"b{v}": f"at(panel + {v} * LANES)" for v in range(vectors)}),
        *[f"            KEEP(b{v});" for v in range(vectors)],
        "            vec c;",
    ]
    for r in range(rows):
        sums = " ".join(f"s{r}{v} += c * b{v};" for v in range(vectors))
        lines.append(f"            c = every(w{r}[k]); {sums}")
    lines.append("        }")
    lines += ["    }", "    if (more) {"]
    place = {(r, v): f"out + {r} * ldo + {v} * LANES" for r, v in each}
    lines += [f"        s{r}{v} += at({place[r, v]});" for r, v in each]
    lines.append("    }")
    lines += [f"    put({place[r, v]}, s{r}{v});" for r, v in each]
    return "\n".join([*lines, "}", ""])


def outer(tokens: int, vectors: int) -> str:
    """``y[t] += sum over n of h[j][t] * tile[j]`` over ``vectors`` vectors of columns.

    Rows of ``h`` are ``ldh`` apart and hold tokens side by side. ``ahead`` columns of ``next``, the
    rows of the tile after this one, ``stride`` apart, are fetched into the second cache meanwhile.
    """
    each = [(t, v) for t in range(tokens) for v in range(vectors)]
    lines = [
        f"static void outer_{tokens}(float *const *y, const float *h, int64_t ldh,",
        "                    const float *tile, int64_t n, const weight_t *next, int64_t stride,",
        "                    int64_t ahead) {",
        _declare("float", {f"*y{t}": f"y[{t}]" for t in range(tokens)}),
        _declare("vec", {f"s{t}{v}": f"at(y{t} + {v} * LANES)" for t, v in each}),
        f"    for (int64_t j = 0; j < n; j++, h += ldh, tile += {vectors} * LANES) {{",
        "        for (int64_t k = 0; k < ahead; k += 64 / (int64_t)sizeof(weight_t))",
        "            __builtin_prefetch(next + k, 0, 2);",
        "        next += stride;",
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


def _declare(kind: str, values: dict[str, str]) -> str:
    return f"    {kind} {', '.join(f'{name} = {value}' for name, value in values.items())};"
