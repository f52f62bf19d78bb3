"""The running softmax (Milakov & Gimelshein, arXiv:1805.02867) of attention kernels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def softmax_step(score, most, norm):
    """One more block of scores (rows, keys) of a running softmax.

    ``most`` (rows,) is the largest score so far, ``norm`` the sum of ``exp(score - most)``. Gives
    the block's exponentials, what earlier sums are multiplied by, and both for the next block. A
    row that has seen no key yet (all -inf) adds nothing.
    """
    now = tl.maximum(most, tl.max(score, 1))
    base = tl.where(now == float("-inf"), 0.0, now)
    share = tl.exp(score - base[:, None])
    fade = tl.exp(most - base)
    return share, fade, now, norm * fade + tl.sum(share, 1)
