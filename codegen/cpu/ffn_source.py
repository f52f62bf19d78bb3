"""The C source of a routed feed-forward layer: ffn.c, specialised.

What a layer is (gated or plain, its activation, the type of its weights, whether neurons of live
experts are selected) and the width of the machine's vectors are fixed at compile time; sizes are
not, so the layers of one model share one kernel.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from sparsify.codegen.cpu.call import DTYPES, part
from sparsify.codegen.cpu.tiles import dots, outer, spread
from sparsify.codegen.elementwise import c_source
from sparsify.codegen.machine import machine
from sparsify.runtime.program import Program

# The C library's expf and tanhf are calls, one number at a time; these are straight-line code that
# the compiler turns into vectors. Cephes' polynomials (Moshier); at most 2 ulp off between -87 and
# 88, infinite and zero beyond, NaN stays NaN.
ELEMENTARY = """\
static inline float exp_vector(float x) {
    float y = x > 88.72283f ? 88.72283f : x;
    y = y < -87.33654f ? -87.33654f : y;
    float n = (y * 1.44269504f + 12582912.0f) - 12582912.0f; /* rounded */
    float r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    union { int32_t i; float f; } two = {((int32_t)n + 126) * (1 << 23)}; /* halved: n may be 128 */
    float found = p * two.f * 2.0f;
    found = x > 88.72283f ? INFINITY : found;
    found = x < -87.33654f ? 0.0f : found;
    return x != x ? x : found;
}
static inline float tanh_vector(float x) {
    float a = fabsf(x), z = x * x;
    float p = -5.70498872745e-3f;
    p = p * z + 2.06390887954e-2f;
    p = p * z - 5.37397155531e-2f;
    p = p * z + 1.33314422036e-1f;
    p = p * z - 3.33332819422e-1f;
    float near = x + x * z * p, far = 1.0f - 2.0f / (exp_vector(2.0f * a) + 1.0f);
    return a < 0.625f ? near : (x < 0.0f ? -far : far);
}
#define expf exp_vector
#define tanhf tanh_vector
"""


def source(activation: Program, *, gated: bool, weights: torch.dtype, thin: bool = False) -> str:
    """The kernel of one kind of layer; CannotLower where its activation has no scalar code.

    Args:
        weights: float32, bfloat16 or int8 (which has scales).
    """
    lanes = machine().lanes
    head = [f"#define LANES {lanes}", f"#define {DTYPES.get(weights, DTYPES[torch.float32])} 1"]
    head += ["#define WEIGHT_INT8 1"] if weights == torch.int8 else []
    head += [sizes(lanes), kind(gated=gated, thin=thin), part("vectors.h"), ELEMENTARY]
    parts = [*head, c_source(activation), part("totals.h"), tiles(lanes)]
    return "\n".join([*parts, part("ffn.c"), part("prefill.c"), part("ffn_threads.c")])


def kind(*, gated: bool, thin: bool = False) -> str:
    """Macros that say what the layer is, above everything but ``LANES`` and the dtype."""
    switches = {
        "GATED": int(gated),
        "ROWS": "(TILE / 2)" if gated else "TILE",  # neurons of few()'s tiles
        "THIN": int(thin),
        "ACT(up, gate)": "act(up, gate)" if gated else "act(up)",
    }
    return _defined(switches)


def sizes(lanes: int) -> str:
    """Macros that say how the kernels are tiled for vectors of ``lanes`` floats."""
    tile = 8 if lanes == 16 else 4  # weight rows of few()'s tiles
    return _defined({"TILE": tile, **_tiling(lanes)})


def tiles(lanes: int) -> str:
    """The tiles for vectors of ``lanes`` floats, after totals.h."""
    tile = 8 if lanes == 16 else 4
    made = [dots(tokens, tile) for tokens in (1, 2, 3)]
    if lanes == 16:  # 32 registers
        made += [spread(8, 2), spread(8, 1), dots(1, 8, packed=True), dots(2, 8, packed=True)]
    else:
        made += [spread(6, 2), spread(12, 1), dots(1, 12, packed=True)]
    made += [outer(tokens, 2) for tokens in range(1, _tiling(lanes)["OUTER"] + 1)]
    return "\n".join(made)


def _defined(switches: Mapping[str, object]) -> str:
    return "\n".join(f"#define {name} {value}" for name, value in switches.items())


def _tiling(lanes: int) -> dict[str, int]:
    """Of prefill.c: rows packed at once, tokens of a tile of outputs, and the most tokens of an
    expert's last vector that are multiplied one by one, since most of that vector would be idle.
    """
    rows, tokens, alone = (8, 8, 11) if lanes == 16 else (12, 6, lanes // 2)
    return {"PACK": rows, "OUTER": tokens, "ALONE": alone, "DEPTH": 512, "PITCH": 528}
