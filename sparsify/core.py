"""The plain data every part speaks: passes, options, claims, rewrites, remarks.

A pass is a frozen dataclass over one region type. Its fields are its options; its docstring's first
line is its summary; ``check`` refuses with a reason; ``rewrite`` returns the new modules, and says
how the dense weights map into them. Nothing here imports torch: listing and parsing stay fast.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import sys
import typing
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar

from sparsify.errors import BadOption, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sparsify.regions import Region
    from sparsify.runtime.spec import RoutedModule

Value = int | float | str | bool
R = TypeVar("R", bound="Region")


# ---------------------------------------------------------------------------- claims


@dataclasses.dataclass(frozen=True)
class Claim:
    """What a rewrite promises at its dense limit (all units live with weight one).

    ``EXACT``: bit for bit. ``REORDERED``: the same sums in another order. ``BOUNDED(eps)``:
    relative error at most eps. ``APPROXIMATE``: measured and reported, never checked; only on
    request.
    """

    kind: Literal["EXACT", "REORDERED", "BOUNDED", "APPROXIMATE"]
    eps: float = 0.0

    def tolerance(self, unit_roundoff: float, length: int, scale: float) -> float:
        """Largest absolute error this claim allows.

        Args:
            unit_roundoff: half an ulp at one of the computing dtype (``finfo.eps / 2``).
            length: how many roundings lie on the longest path (sum of reduction lengths).
            scale: largest absolute value of the compared output.

        The rounding errors of a reordered sum of ``n`` terms behave like a random walk: their
        standard deviation is about ``u * sqrt(n) * scale`` (Higham & Mary 2019, "A new approach to
        probabilistic rounding error analysis", Theorem 2.4). Two sums are compared (sqrt 2) and the
        bound should hold for every output element of a model (lambda = 6 standard deviations fails
        with probability 2e-9 an element), which gives the factor 6 * sqrt(2) < 8.5.
        """
        if self.kind == "EXACT":
            return 0.0
        if self.kind == "REORDERED":
            return 8.5 * unit_roundoff * math.sqrt(max(length, 1)) * max(scale, 1e-30)
        if self.kind == "BOUNDED":
            return self.eps * max(scale, 1e-30)
        return math.inf

    def __str__(self) -> str:
        return f"BOUNDED({self.eps:g})" if self.kind == "BOUNDED" else self.kind


EXACT = Claim("EXACT")
REORDERED = Claim("REORDERED")
APPROXIMATE = Claim("APPROXIMATE")


def BOUNDED(eps: float) -> Claim:  # noqa: N802  (reads as the claim's name)
    """A claim of relative error at most ``eps``."""
    return Claim("BOUNDED", eps)


# ---------------------------------------------------------------------------- remarks and refusals

RemarkKind = Literal["applied", "left", "near-miss"]


@dataclasses.dataclass(frozen=True)
class Remark:
    """What happened to one region under one pass, or why the matcher did not take a candidate.

    Attributes:
        kind: ``applied``, ``left`` (dense, with a reason) or ``near-miss`` (not a region; the role
            that failed is in ``reason``).
        region: the region's path in the model, e.g. ``model.layers.0.mlp``.
        region_kind: ``FeedForward``, ``Attention``, ...
        reason: for ``left`` and ``near-miss``, why; for ``applied``, what was built.
        suggestion: what the user can do, if anything.
        where: ``file.py:line   source text`` of the user's model.
    """

    kind: RemarkKind
    pass_name: str
    region: str
    region_kind: str
    reason: str
    suggestion: str | None = None
    where: str | None = None


class Refused(Exception):
    """Raised by ``Pass.check`` or ``Pass.rewrite``: the region stays dense, with this reason."""

    def __init__(self, reason: str, *, suggestion: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.suggestion = suggestion


# ---------------------------------------------------------------------------- rewrites


@dataclasses.dataclass(frozen=True)
class Splice:
    """One new module in place of one site of a region (or beside it).

    Attributes:
        name: the module's attribute name under the region's path, and the handle by which later
            splices of the same rewrite name its output.
        module: the routed module (from ``sparsify.runtime``).
        inputs: what it is called with: port names of the region, or names of earlier splices.
        site: the region's site whose result it replaces, or None for an added node.
    """

    name: str
    module: nn.Module
    inputs: tuple[str, ...]
    site: str | None = None


@dataclasses.dataclass(frozen=True)
class Moved:
    """How one dense weight went into a routed module, so that it can be taken out again.

    ``sparsify.weights.dense_weights`` runs the inverse.

    Attributes:
        dense: the state-dict name before; sparse: the name after (``module path.parameter``).
        how: the rule, for readers.
        role: key of the tensor in the routed module's ``dense_weights()``.
        transposed: the dense model stores it (in, out).
        rows: half-open runs of output rows that it takes of a fused projection; empty = all.
    """

    dense: str
    sparse: str
    how: str
    role: str = ""
    transposed: bool = False
    rows: tuple[tuple[int, int], ...] = ()


@dataclasses.dataclass(frozen=True)
class Rewrite:
    """What a pass returns for one region."""

    splices: tuple[Splice, ...]
    weights: tuple[Moved, ...] = ()
    note: str = ""
    moved: Mapping[str, str] = dataclasses.field(
        default_factory=dict
    )  # modules: path before -> now
    claim: Claim | None = None  # where this region gets less than the pass claims
    hosted: RoutedModule | None = None  # goes into the region's host, not into the graph
    length: int = 0  # roundings on the longest path, for the REORDERED tolerance; 0 = the region's


# ---------------------------------------------------------------------------- options


def option(
    default: Any,
    help: str,  # noqa: A002
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    among: Sequence[str] | None = None,
) -> Any:
    """A pass option: a dataclass field with its help and its legal values."""
    bounds = {"ge": ge, "gt": gt, "le": le, "lt": lt}
    return dataclasses.field(
        default=default,
        metadata={
            "help": help,
            "among": tuple(among) if among else None,
            "bounds": {k: v for k, v in bounds.items() if v is not None},
        },
    )


@dataclasses.dataclass(frozen=True)
class OptionInfo:
    """One row of a pass's option table."""

    name: str
    type: str
    default: Value
    help: str
    legal: str


_BOUND_TEXT = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def _legal(field: dataclasses.Field[Any]) -> str:
    among = field.metadata.get("among")
    if among:
        return " | ".join(among)
    bounds = field.metadata.get("bounds", {})
    return " and ".join(f"{_BOUND_TEXT[k]} {v:g}" for k, v in bounds.items())


def _convert(cls: type[Pass[Any]], field: dataclasses.Field[Any], value: Value) -> Value:
    """``value`` as the field's type, or BadOption."""
    kind = typing.get_type_hints(cls)[field.name]
    ok: Value
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        ok = float(value)
    elif kind is int and isinstance(value, float) and value.is_integer():
        ok = int(value)
    elif type(value) is kind:
        ok = value
    else:
        raise BadOption(
            f"option '{field.name}' of {cls.name} takes {kind.__name__}, not {value!r}",
            help=_legal(field) and f"{field.name} is {_legal(field)}",
        )
    among, bounds = field.metadata.get("among"), field.metadata.get("bounds", {})
    if among and ok not in among:
        hint = did_you_mean(str(ok), among)
        raise BadOption(
            f"option '{field.name}' of {cls.name} cannot be '{ok}'",
            help=(f"{hint}  " if hint else "") + f"one of: {', '.join(among)}",
        )
    tests = {"ge": lambda v, b: v >= b, "gt": lambda v, b: v > b}
    tests |= {"le": lambda v, b: v <= b, "lt": lambda v, b: v < b}
    if not all(tests[k](ok, b) for k, b in bounds.items()):
        raise BadOption(
            f"option '{field.name}' of {cls.name} cannot be {ok:g}",
            help=f"{field.name} must be {_legal(field)}",
        )
    return ok


# ---------------------------------------------------------------------------- the pass contract


@dataclasses.dataclass(frozen=True)
class Pass(Generic[R]):
    """A rewrite of one kind of region, as one frozen dataclass in one file.

    ``class FfnMoe(Pass[FeedForward])`` in ``passes/ffn_moe.py`` is the pass ``ffn-moe``. Subclasses
    define fields with :func:`option`, and ``rewrite``; ``check`` and ``taps`` where needed.
    """

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    region_type: ClassVar[type[Any]]
    moves_weights: ClassVar[bool] = True  # False: it routes, and leaves every weight where it is
    works_inside: ClassVar[bool] = False  # takes parts that have a host (see Region.host) too
    claim: ClassVar[Claim] = REORDERED

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        module = sys.modules.get(cls.__module__)
        stem = cls.__module__.rpartition(".")[2]
        cls.name = cls.__dict__.get("name") or stem.replace("_", "-")
        doc = (inspect.getdoc(module) if module else None) or inspect.getdoc(cls) or ""
        cls.summary = doc.strip().splitlines()[0] if doc.strip() else ""
        for base in getattr(cls, "__orig_bases__", ()):
            if typing.get_origin(base) is Pass:
                cls.region_type = typing.get_args(base)[0]

    # -- what a pass author writes

    def check(self, region: R) -> None:
        """Raise :class:`Refused` where this region cannot be rewritten. Changes nothing."""

    def taps(self, region: R) -> Mapping[str, int]:
        """What to sample from calibration data: port name -> tokens wanted. Empty = nothing.

        ``port.energy`` asks for the squared norm of the port's rows instead of the rows;
        ``x.slope`` (of projections) for how far each feature of ``x`` moves the model's result
        (:mod:`sparsify.sensitivity`), which takes gradients.
        """
        return {}

    def rewrite(self, region: R) -> Rewrite:
        """The routed form of ``region``; must meet ``claim`` when everything is live."""
        raise NotImplementedError

    def settle(self, module: nn.Module, inputs: tuple[Tensor, ...], alone: bool) -> Tensor | None:
        """Adjust a module that this pass made to the inputs that it gets in the sparse model.

        Called just before the module runs, in graph order, while calibration data flows through
        the sparse graph at a budget below one (see :mod:`sparsify.settle`). With everything live
        the module must give what it gave before.

        Args:
            alone: the other passes' routers keep everything live; else all have the same budget.

        Returns:
            the module's result, where settling computes it on the way; None = run the module.
        """
        return None

    # -- what follows from the fields

    @classmethod
    def build(cls, options: Mapping[str, Value]) -> Pass[R]:
        """A pass from parsed options; raises BadOption with the closest known name."""
        fields = {f.name: f for f in dataclasses.fields(cls)}
        values: dict[str, Value] = {}
        for key, value in options.items():
            if key not in fields:
                hint = did_you_mean(key, fields)
                known = f"options: {', '.join(fields)}" if fields else f"{cls.name} has no options"
                raise BadOption(
                    f"{cls.name} has no option '{key}'",
                    help=f"{hint}  ({known})" if hint else known,
                )
            values[key] = _convert(cls, fields[key], value)
        return cls(**values)

    @classmethod
    def options(cls) -> tuple[OptionInfo, ...]:
        """The option table, for help, docs and JSON."""
        hints = typing.get_type_hints(cls)
        return tuple(
            OptionInfo(
                f.name,
                hints[f.name].__name__,
                typing.cast(Value, f.default),
                f.metadata.get("help", ""),
                _legal(f),
            )
            for f in dataclasses.fields(cls)
        )

    def changed_options(self) -> dict[str, Value]:
        """The options that differ from their defaults, in field order."""
        current = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {
            f.name: current[f.name]
            for f in dataclasses.fields(self)
            if current[f.name] != f.default
        }
