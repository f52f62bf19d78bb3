"""What is known of a kernel before it runs: how it is specialised, and what it has to move.

A kernel module ends in ``SPECS``: one :class:`KernelSpec` for each kernel, at the specialisation
that a real model would ask for. :mod:`sparsify.codegen.triton.facts` compiles them for every
target, :mod:`sparsify.codegen.triton.traffic` counts what they load and store, tests and goldens
hold both.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from sparsify.codegen.triton.traffic import Sample
from sparsify.errors import BadInput, did_you_mean

# Modules with SPECS; those of another lowering are added by their name.
MODULES: tuple[str, ...] = (
    "sparsify.codegen.triton.attend_specs",
    "sparsify.codegen.triton.columns",
    "sparsify.codegen.triton.ffn",
    "sparsify.codegen.triton.ffn_backward",
    "sparsify.codegen.triton.ffn_decode",
    "sparsify.codegen.triton.groups",
    "sparsify.codegen.triton.linear",
    "sparsify.codegen.triton.parts",
    "sparsify.codegen.triton.router",
    "sparsify.codegen.triton.rows",
    "sparsify.codegen.triton.tokens",
)


@dataclasses.dataclass(frozen=True)
class KernelSpec:
    """One kernel at one specialisation.

    Attributes:
        name: of the golden files; unique.
        kernel: what ``triton.jit`` made.
        signature: type of every argument that is not constexpr, in order: ``*bf16``, ``i32``,
            ``fp32``.
        constexprs: value of every constexpr argument.
        num_warps, num_stages: as launched.
        aligned: integer arguments that are multiples of 16 (pointers always are): without it, no
            vector loads.
        gemm: whether it multiplies matrices, that is: must use the tensor cores of every target.
        sample: makes a :class:`~sparsify.codegen.triton.traffic.Sample` of an operator that
            launches the kernel. None = traffic is not counted.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    aligned: tuple[str, ...] = ()
    gemm: bool = False
    sample: Callable[[], Sample] | None = None

    @property
    def source_name(self) -> str:
        """The kernel function's own name."""
        return str(getattr(self.kernel, "__name__", self.kernel.fn.__name__))


def registered() -> Iterator[KernelSpec]:
    """All kernels, module by module."""
    seen: set[str] = set()
    for name in MODULES:
        for spec in importlib.import_module(name).SPECS:
            if spec.name in seen:
                raise ValueError(f"two kernels are called {spec.name}")
            seen.add(spec.name)
            yield spec


def find(name: str) -> KernelSpec:
    """The kernel of this name; BadInput with the closest name where there is none."""
    known = {spec.name: spec for spec in registered()}
    if name not in known:
        raise BadInput(
            f"no kernel named '{name}'",
            help=did_you_mean(name, known) or f"one of: {', '.join(known)}",
        )
    return known[name]
