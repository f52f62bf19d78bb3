"""Functions that Triton has on some targets only, written out for all and for the interpreter."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """Relative error below 4 eps: a polynomial below 0.625 (Cephes, tanhf), else by exp(-2|x|)."""
    z = x * x
    p = -5.70498872745e-3
    p = p * z + 2.06390887954e-2
    p = p * z - 5.37397155531e-2
    p = p * z + 1.33314422036e-1
    p = p * z - 3.33332819422e-1
    small = p * z * x + x
    e = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) < 0.625, small, tl.where(x < 0.0, -large, large))


@triton.jit
def expm1(x):
    """exp(x) - 1 without cancellation (Kahan): the rounding of exp(x) divides out."""
    e = tl.exp(x)
    far = (x > 20.0) | (x < -15.0) | (x != x)
    near = (e - 1.0) * x / tl.log(tl.where(far | (e == 1.0), 2.0, e))
    return tl.where(far, e - 1.0, tl.where(e == 1.0, x, near))


@triton.jit
def log1p(x):
    """log(1 + x) without cancellation (Kahan): the rounding of 1 + x divides out."""
    s = 1.0 + x
    usual = tl.log(s) * x / tl.where(s == 1.0, 1.0, s - 1.0)
    return tl.where(s == 1.0, x, tl.where(s == float("inf"), s, usual))
