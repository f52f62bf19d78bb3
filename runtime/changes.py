"""A count of changes to routed modules: what was read off them is good for as long as it stands.

A kernel that decodes a token would have to look at a dozen attributes of its module to know that
what it prepared in the last call still holds: dial, tables, weights, who watches. Objects that were
last touched before all other weights came through the caches take a microsecond each, more than
half of the time of a small kernel. Instead all of them count their changes here, in one number.

In-place changes of values do not count, nor does ``parameter.data = ...``: whoever keeps pointers
compares :meth:`torch.Tensor.data_ptr`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

if TYPE_CHECKING:
    from typing_extensions import Self


class Changes:
    """The one number."""

    count = 0


class Noticed(nn.Module):
    """A module whose changes count: attributes, parameters, buffers, submodules, moves, hooks that
    are put in."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        Changes.count += 1

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        Changes.count += 1

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        Changes.count += 1
        return super().register_forward_hook(*args, **kwargs)

    def register_forward_pre_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        Changes.count += 1
        return super().register_forward_pre_hook(*args, **kwargs)

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        super().register_buffer(name, tensor, persistent)
        Changes.count += 1

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        super().register_parameter(name, param)
        Changes.count += 1

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        Changes.count += 1
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        Changes.count += 1
