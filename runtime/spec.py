"""Routed modules: what they share, and how they are rebuilt from JSON.

A checkpoint holds, for every routed module, its ``spec()``: class name, sizes, options, programs.
``from_spec`` finds the class by name among those registered with ``@routed`` and builds it with
empty weights, which the checkpoint's tensors then fill. A third-party routed module derives from
``RoutedModule``, writes ``options`` and ``from_options``, and is registered with ``@routed``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from sparsify.errors import BadCheckpoint, PassClash, did_you_mean
from sparsify.runtime.changes import Noticed
from sparsify.runtime.cost import Cost
from sparsify.runtime.counters import Counter
from sparsify.runtime.dispatch import watched

if TYPE_CHECKING:
    from typing_extensions import Self

Spec = dict[str, Any]
Dispatch = Literal["auto", "grouped", "masked"]


# A faster implementation of one routed module's forward (sparsify.codegen): called with the module
# and forward's inputs, it gives what forward gives and counts what forward counts, or None where
# eager has to run.
Kernel = Callable[..., Any]


class RoutedModule(Noticed):
    """Base of every routed module.

    Attributes:
        dispatch: ``auto`` merges neighbouring units that are live for every token into one matmul
            (all live = the dense computation); ``grouped`` multiplies unit by unit. Verification
            forces ``grouped``. ``masked`` computes every unit for every token and multiplies dead
            ones by zero, where a module can: nothing is skipped, but training is faster
            (:mod:`sparsify.runtime.training`).
        computes_masked: whether the class has such a way.
        pass_name: the pass that made the module; the dial can be turned per pass.
        counter: work done since the last reset; not part of the state dict.
        kernel: what codegen put in place of the eager forward, for inference; not saved. Eager is
            the meaning: it runs in training, in verification, and where the kernel declines.
    """

    dispatch: Dispatch = "auto"
    kernel: Kernel | None = None
    computes_masked: ClassVar[bool] = False
    pass_name: str = ""

    def __init__(self) -> None:
        super().__init__()
        self.counter = Counter()

    def lowered(self, *inputs: Tensor) -> Any:
        """What the kernel makes of the inputs; None where there is none, or it declines."""
        if self.kernel is None or self.dispatch != "auto" or watched(inputs[0], self):
            return None
        return self.kernel(self, *inputs)

    def options(self) -> Spec:
        """JSON from which :meth:`from_options` builds this module with empty weights."""
        raise NotImplementedError

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """A module of this shape, weights uninitialised."""
        raise NotImplementedError

    def spec(self) -> Spec:
        """``options()`` with what every routed module has: class, pass, dispatch."""
        common = {"pass": self.pass_name, "dispatch": self.dispatch}
        return {"class": type(self).__name__, **common, **self.options()}

    def cost(self, active: float | None = None, context: int = 0) -> Cost:
        """Cost of one token.

        Args:
            active: fraction of units live; None = what the module's own router is set to, or 1
                where the selection comes from outside.
            context: keys that the token attends to (attention only).
        """
        raise NotImplementedError

    def dense_weights(self) -> dict[str, Tensor]:
        """role -> tensor in the dense model's layout: the executable inverse of the weight map."""
        return {}

    @property
    def hosts(self) -> tuple[str, ...]:
        """Roles of the linears inside that a later pass may route."""
        return ()

    def host(self, role: str, part: RoutedModule) -> None:
        """Take ``part`` in, which routes the linear ``role``, one of :attr:`hosts`."""
        raise NotImplementedError

    def params(self) -> int:
        """Number of parameters."""
        return sum(p.numel() for p in self.parameters())


M = TypeVar("M", bound=type[RoutedModule])

_CLASSES: dict[str, type[RoutedModule]] = {}
# Ours are imported when a spec names them, so that loading needs no imports by the caller.
_OURS: dict[str, str] = {
    "Router": "sparsify.runtime.router",
    "TaskRouter": "sparsify.runtime.task_router",
    "SparsityRouter": "sparsify.runtime.sparsity",
    "Prefix": "sparsify.runtime.prefix",
    "Magnitude": "sparsify.runtime.inputs",
    "RoutedLinear": "sparsify.runtime.inputs",
    "Factor": "sparsify.runtime.gated",
    "GatedLinear": "sparsify.runtime.gated",
    "RoutedFFN": "sparsify.runtime.ffn",
    "CompressedFFN": "sparsify.runtime.compressed",
    "FewBitsFFN": "sparsify.runtime.few_bits",
    "LiveNeurons": "sparsify.runtime.inside",
    "ConditionedFFN": "sparsify.runtime.conditioned",
    "ModalityFFN": "sparsify.runtime.modality",
    "ModalityLinear": "sparsify.runtime.modality",
    "LatentProjection": "sparsify.runtime.latent",
    "Features": "sparsify.runtime.latent",
    "TiedLinear": "sparsify.runtime.tied",
    "RecursionRouter": "sparsify.runtime.recursion",
    "DepthChoice": "sparsify.runtime.recursion",
    "LatentFFN": "sparsify.runtime.latent_ffn",
    "ArchitectureRouter": "sparsify.runtime.supernet",
    "SupernetFFN": "sparsify.runtime.supernet",
    "RoutedRows": "sparsify.runtime.heads",
    "RoutedColumns": "sparsify.runtime.heads",
    "RoutedAttend": "sparsify.runtime.attend",
    "HiddenRouter": "sparsify.runtime.hidden",
    "HiddenFFN": "sparsify.runtime.hidden",
    "HiddenColumns": "sparsify.runtime.hidden",
    "SpanAttend": "sparsify.runtime.spans",
    "BlockAttend": "sparsify.runtime.block_attend",
    "DepthRouter": "sparsify.runtime.depth",
    "RoutedLayer": "sparsify.runtime.depth",
}


def routed(cls: M) -> M:
    """Class decorator: make ``cls`` loadable from a checkpoint under its class name."""
    name = cls.__name__
    known = _CLASSES.get(name)
    ours = _OURS.get(name, cls.__module__)
    if ours != cls.__module__ or (known is not None and known.__module__ != cls.__module__):
        other = known.__module__ if known is not None else ours
        raise PassClash(
            f"two routed modules are called '{name}'",
            why=f"one in {other}, one in {cls.__module__}",
            help="rename one of the classes",
        )
    _CLASSES[name] = cls
    return cls


def from_spec(spec: Mapping[str, Any]) -> RoutedModule:
    """The module that ``spec()`` described, weights uninitialised; BadCheckpoint if unknown."""
    name = spec.get("class")
    if isinstance(name, str) and name in _OURS and name not in _CLASSES:
        importlib.import_module(_OURS[name])
    if not isinstance(name, str) or name not in _CLASSES:
        raise BadCheckpoint(
            f"the model uses a routed module '{name}' that is not known here",
            help=did_you_mean(str(name), _OURS | _CLASSES)
            or "import the package that defines it before loading",
        )
    try:
        module = _CLASSES[name].from_options(spec)
    except (KeyError, TypeError, ValueError) as error:
        raise BadCheckpoint(
            f"the description of a {name} cannot be read",
            why=f"{type(error).__name__}: {error}",
            help="the file is damaged or comes from a newer sparsify",
        ) from error
    module.pass_name = str(spec.get("pass", ""))
    module.dispatch = "grouped" if spec.get("dispatch") == "grouped" else "auto"
    return module


R = TypeVar("R", bound=RoutedModule)


def nested(spec: Mapping[str, Any], kind: type[R]) -> R:
    """:func:`from_spec` for a part that must be a ``kind``."""
    module = from_spec(spec)
    if not isinstance(module, kind):
        raise BadCheckpoint(f"a {type(module).__name__} stands where a {kind.__name__} belongs")
    return module


def is_routed(module: nn.Module) -> bool:
    """Whether ``module`` can be stored by its spec."""
    return _CLASSES.get(type(module).__name__) is type(module)


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """The inverse of :func:`dtype_name`; ValueError where it names no dtype."""
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"no dtype {name!r}")
    return found
