"""What the launchers share: where kernels can run, tile sizes, and dtypes.

Kernels read tensors where they lie. What they need contiguous is a row (the last dimension); other
strides are passed on, so that transposed and sliced inputs are not copied.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from sparsify.core import Refused

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
PROGRAMS = 256  # that fill a GPU of about 128 multiprocessors twice


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (``TRITON_INTERPRET=1`` before the import)."""
    return bool(triton.knobs.runtime.interpret)


def check_tensor(x: Tensor) -> None:
    """Raise Refused where no kernel can run on ``x``."""
    if x.device.type not in ("cuda", "xpu") and not interpreted():
        raise Refused(
            f"Triton kernels need a GPU, and this model is on {x.device.type}",
            suggestion="model.to('cuda'), or TRITON_INTERPRET=1 to check kernels without a GPU",
        )
    if x.dtype not in FLOATS:
        name = str(x.dtype).removeprefix("torch.")
        raise Refused(f"no Triton kernel in {name}", suggestion="float32, bfloat16 or float16")


def rowwise(x: Tensor) -> Tensor:
    """``x``, its last dimension contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def precision(x: Tensor) -> str:
    """How ``tl.dot`` multiplies: float32 exactly, not as tf32 (eager is the meaning)."""
    return "ieee" if x.dtype == torch.float32 else "tf32"  # ignored for half types


def tile(size: int, most: int) -> int:
    """A block size for ``size``: a power of two from 16 (the least of ``tl.dot``) to ``most``."""
    return int(min(max(triton.next_power_of_2(size), 16), most))


def token_tile(tokens: int) -> int:
    """Tokens of one program: few where there are few, since ``tl.dot`` takes at least 16."""
    return 16 if tokens <= 16 else 32 if tokens <= 32 else 64


def splits(programs: int, inputs: int, tokens: int) -> int:
    """In how many parts to cut a reduction over ``inputs`` so that the GPU is full.

    A power of two, at most 16. The parts are float32, written and read: 8 bytes for each output of
    a token, beside about one byte of live weight for each input (half types, half of it live). One
    part per ``128 * tokens`` inputs keeps them at a sixteenth of what is moved.
    """
    wanted = 1
    while wanted < 16 and wanted * 2 * programs <= PROGRAMS and wanted * 256 * tokens <= inputs:
        wanted *= 2
    return wanted
