"""When what was made of a module's weights is still right: a stamp of the weights themselves.

Modules that keep something derived from their weights (experts fused, or mixed) compare stamps
before they use it: one changes when a weight is written in place, replaced, moved or cast, and when
an adapter over it is switched. A write through ``parameter.data`` leaves no trace.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from sparsify.runtime.lora import LoRA


def stamp(module: nn.Module) -> tuple[Any, ...] | None:
    """What identifies the present values of all parameters; None where they cannot be followed.

    Inference tensors count no writes.
    """
    tensors = list(module.parameters())
    if any(t.is_inference() for t in tensors):
        return None
    adapters = (m.enabled for m in module.modules() if isinstance(m, LoRA))
    return (*((t.data_ptr(), t._version, t.dtype) for t in tensors), *adapters)
