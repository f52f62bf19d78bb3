"""The routed feed-forward layer on CPU: one call from scores to the sum over live experts.

A few tokens (decoding) go through one C call: score, select, read the live experts' rows, activate,
add up, stand-ins for the dead. Many tokens are selected by the eager router, then two parallel
loops compute the neurons of live pairs and the outputs. Between the two, and wherever the dense
computation is faster, what was measured decides (:mod:`sparsify.codegen.cpu.tune`).
"""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from sparsify.codegen.cpu.build import load, threads
from sparsify.codegen.cpu.call import FEW, Lowered, checked, dtype_of, plain, usable, version
from sparsify.codegen.cpu.ffn_source import source
from sparsify.codegen.cpu.linear import quantised
from sparsify.codegen.routing import fuses, undisturbed
from sparsify.runtime.changes import Changes
from sparsify.runtime.dropped import at_budget
from sparsify.runtime.ffn import RoutedFFN
from sparsify.runtime.inside import LiveNeurons
from sparsify.runtime.router import Router
from sparsify.runtime.spec import Binding

Way = Literal["few", "prefill", "dense"]

_POINTERS = (
    "x y up gate down up_bias gate_bias down_bias up_scale gate_scale down_scale router "
    "router_bias order dropped slopes centre weigh offset select scores"
).split()
_SIZES = "T N m D R keep".split()


class Arguments(ctypes.Structure):
    """``ffn`` of ffn.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _SIZES),
        ("threshold", ctypes.c_float),
        ("cut", ctypes.c_float),
        *((name, ctypes.c_int64) for name in ("threads", "live", "thin")),
    )


@dataclasses.dataclass
class _Ready:
    """Arguments of few() for a number of tokens, with room for scores and selection."""

    args: Arguments
    address: int
    room: Tensor

    @staticmethod
    def of(base: Arguments, T: int, everything: bool) -> _Ready:
        args = Arguments.from_buffer_copy(base)
        room = torch.ones(T * (args.N + args.R))
        args.T, args.select = T, room.data_ptr()
        if everything:
            args.router = None
        args.scores = room.data_ptr() + 4 * T * args.N
        return _Ready(args, ctypes.addressof(args), room)


Choose = Callable[[int, float], Way]


def untuned(tokens: int, active: float) -> Way:
    """The way before anything was measured."""
    return "dense"


class FfnKernel(Lowered):
    """The kernel of one RoutedFFN.

    Args:
        module: the layer it is for.
        choose: (tokens, active) -> the way; :mod:`sparsify.codegen.cpu.tune` measures which.
        int8: read an int8 copy of the weights with one scale per neuron, made here and again when
            they change. Results change with it: it is asked for, never chosen.

    Raises:
        NoCompiler, BuildFailed, CannotLower; Refused where the layer is of a kind that it does not
        know.
    """

    def __init__(self, module: RoutedFFN, choose: Choose = untuned, *, int8: bool = False) -> None:
        self.choose = choose
        self.int8 = int8
        self.dtype = dtype_of(module.up)
        library = self._library(module, thin=module.inside is not None)
        self.few, self.prefill, self.routes = library.few, library.prefill, library.routes
        # where all neurons of live experts are live, nobody looks at each of them
        self.whole = self.few if module.inside is None else self._library(module, thin=False).few
        for entry in (self.few, self.prefill, self.routes, self.whole):
            entry.argtypes, entry.restype = (ctypes.c_void_p,), ctypes.c_int64
        self._everything = self._fuses = False
        self.forget()

    def _library(self, module: RoutedFFN, *, thin: bool) -> ctypes.CDLL:
        text = source(
            module.activation,
            gated=module.gate is not None,
            weights=torch.int8 if self.int8 else self.dtype,
            thin=thin,
        )
        return load(text, "ffn")

    def forget(self) -> None:
        self._entry = self.few  # or whole
        self._key: tuple[int | None, ...] = ()
        self._base: Arguments | None = None
        self._kept: list[Tensor] = []  # what the pointers of _base point to
        self._direct: list[Tensor] = []  # the module's tensors that are read where they lie,
        self._places: list[int] = []  # which is there,
        self._copied: list[Tensor] = []  # and those that something was made of, when they
        self._versions: list[tuple[int, int]] = []  # looked so
        self._spare: dict[int, list[_Ready]] = {}  # by number of tokens

    def __call__(self, module: RoutedFFN, x: Tensor) -> Tensor | None:
        """x (..., D) -> (..., D), or None where eager has to run."""
        if not plain(x, self.dtype) or not x.numel():
            return None
        router: Router = module._modules["router"]  # type: ignore[assignment]
        base = self._settled(module, router)
        if base is None:
            return None
        T = x.numel() // base.D
        everything = self._everything
        way = self.choose(T, 1.0 if everything else router.active)
        if way == "dense":  # with everything live eager is dense by itself
            return None if everything else self._dense(module, x, x.reshape(T, -1))
        if (
            way == "few" and self.dtype is torch.float32 and x.is_contiguous()
            and self._selects(router)
        ):  # fmt: skip
            return self._at_once(module, x, T, base)
        inside = module._modules.get("inside")
        if way == "prefill" and inside is not None:
            return None
        return self._run(way, module, x, T, base)

    def bind(self, modules: Sequence[RoutedFFN]) -> Binding | None:
        """A call of few tokens while nothing changes; None where there is none."""
        if len(modules) > 1 or modules[0].dispatch != "auto" or self.dtype is not torch.float32:
            return None
        (module,) = modules
        changes, router = Changes.count, module.router
        base = self._settled(module, router)
        if base is None or not self._selects(router):
            return None
        active = 1.0 if self._everything else router.active
        few = [T for T in range(1, FEW + 1) if self.choose(T, active) == "few"]
        D = base.D

        def call(x: Tensor) -> Tensor:
            T = x.numel() // D
            if (
                T not in few or changes != Changes.count or type(x) is not Tensor
                or x.dtype is not torch.float32 or not x.is_contiguous()
            ):  # fmt: skip
                return module.forward(x)
            return self._at_once(module, x, T, base)

        return Binding(call, self._copied) if few else None

    def _selects(self, router: Router) -> bool:
        """Whether C can select too, or nothing has to be selected."""
        return self._everything or (self._fuses and undisturbed(router))

    @staticmethod
    def _dense(module: RoutedFFN, x: Tensor, rows: Tensor) -> Tensor:
        """Every expert on every token, where that is faster: dead ones count as zero."""
        router = module.router
        scores = router.scores(x)
        select = router(x, scores).reshape(len(rows), -1)
        return module._masked(rows, select, scores.reshape(len(rows), -1)).view(x.shape)

    def _at_once(self, module: RoutedFFN, x: Tensor, T: int, base: Arguments) -> Tensor:
        """A few tokens, scored and selected in C too: one call, in a struct that is used again."""
        spares = self._spare.setdefault(T, [])
        try:
            ready = spares.pop()  # nobody else's meanwhile
        except IndexError:
            ready = _Ready.of(base, T, self._everything)
        args = ready.args
        y = torch.empty_like(x)
        args.x, args.y, args.threads = x.data_ptr(), y.data_ptr(), threads()
        checked(self._entry(ready.address))
        self._count(module, T, args)
        spares.append(ready)
        return y

    def _count(self, module: RoutedFFN, T: int, args: Arguments) -> None:
        live, counter, experts = args.live, module.counter, module.experts
        if experts != args.N:  # all of them as one
            live *= experts
        counter.seen(T, experts, live)
        counter.rows += live
        inside = module._modules.get("inside")
        if isinstance(inside, LiveNeurons) and self._entry is not self.whole:
            inside._seen(T, live, args.thin)
            inside.counter.rows += args.thin

    def _run(
        self, way: Way, module: RoutedFFN, x: Tensor, T: int, base: Arguments
    ) -> Tensor | None:
        """Route and compute; what stands in for dead experts is added."""
        router: Router = module._modules["router"]  # type: ignore[assignment]
        everything = self._everything
        fused = not everything and self._fuses and undisturbed(router)
        args = Arguments.from_buffer_copy(base)
        N = args.N
        wide = x if self.dtype is torch.float32 else x.float()
        wide = wide if wide.is_contiguous() else wide.contiguous()
        scores: Tensor | None = None
        if everything:
            select = wide.new_ones(T * N)
        elif not fused:
            given = router.scores(x)
            select, scores = _flat(router(x, given)), _flat(given)
        elif way == "few":
            select = wide.new_empty(T * (N + args.R))  # and the scores behind
            args.scores = select.data_ptr() + 4 * T * N
        else:
            select, scores = wide.new_empty(T * N), _flat(router.scores(x))
            self._call(self.routes, args, T, wide, wide, select, scores)
        if not fused or way == "prefill":
            args.router = None
        y = torch.empty_like(wide)
        self._call(self._entry if way == "few" else self.prefill, args, T, wide, y, select, scores)
        self._count(module, T, args)
        if way == "prefill" and args.live < T * N and (args.dropped or args.slopes):
            known = None if scores is None else scores.view(T, -1)
            y = module.stood_in(y.view(T, -1), select.view(T, N) != 0, known).view(x.shape)
        return y if self.dtype is torch.float32 else y.to(self.dtype)

    def compute(self, way: Way, module: RoutedFFN, x: Tensor, select: Tensor) -> Tensor | None:
        """x (T, D), select (T, N) -> the live experts' sum and the bias (T, D); nothing counted."""
        base = self._settled(module, module.router, everything=True)
        if base is None:
            return None
        args = Arguments.from_buffer_copy(base)
        args.N, args.m, _ = module.up.shape  # though everything may be one expert otherwise
        wide = x.float().contiguous()
        y = torch.empty_like(wide)
        args.router = None
        call = self.few if way == "few" else self.prefill
        self._call(call, args, len(x), wide, y, _flat(select), None)
        return y.to(x.dtype)

    @staticmethod
    def _call(
        entry: Any,
        args: Arguments,
        T: int,
        x: Tensor,
        y: Tensor,
        select: Tensor,
        scores: Tensor | None,
    ) -> None:
        args.x, args.y, args.select = x.data_ptr(), y.data_ptr(), select.data_ptr()
        if scores is not None:
            args.scores = scores.data_ptr()
        args.T, args.threads = T, threads()
        checked(entry(ctypes.addressof(args)))

    def _settled(
        self, module: RoutedFFN, router: Router, everything: bool | None = None
    ) -> Arguments | None:
        """All that does not depend on the call, from the cache while nothing has changed.

        A decoded token passes through here for every layer: looking up the dial's properties anew
        took longer than the kernel.
        """
        own, its = module._parameters, router._parameters
        inside = module._modules.get("inside")
        key: tuple[int | None, ...] = (
            everything, router.turns, inside.turns if isinstance(inside, LiveNeurons) else None,
            *map(id, map(own.get, _OWN)), id(its["weight"]), id(its["bias"]),
        )  # fmt: skip
        if key == self._key:
            direct, copied = self._direct, self._copied
            if [t.data_ptr() for t in direct] == self._places and (
                [(version(t), t.data_ptr()) for t in copied] == self._versions
            ):
                return self._base
        self._base, self._spare, self._direct, self._copied = None, {}, [], []
        packed = [t for t in map(own.get, ("up", "gate", "down")) if t is not None]
        if usable(packed, [self.dtype] * len(packed)):
            self._everything = router.all_live if everything is None else everything
            self._base, self._kept = self._read(module, router)
        self._places = [t.data_ptr() for t in self._direct]
        self._versions = [(version(t), t.data_ptr()) for t in self._copied]
        self._fuses = fuses(router)
        self._key = key
        return self._base

    def _read(self, module: RoutedFFN, router: Router) -> tuple[Arguments | None, list[Tensor]]:
        args, kept = Arguments(), list[Tensor]()
        args.N, args.m, args.D = module.up.shape
        args.R = router.routed

        def put(name: str, tensor: Tensor | None, wide: bool = True) -> None:
            if tensor is None:
                return
            value = tensor.detach()
            value = value.float().contiguous() if wide else value.contiguous()
            kept.append(value)
            setattr(args, name, value.data_ptr())
            if value.data_ptr() == tensor.data_ptr():
                self._direct.append(tensor)
            else:
                self._copied.append(tensor)

        for name in ("up", "gate", "down"):
            packed = getattr(module, name)
            if self.int8 and packed is not None:
                self._copied.append(packed)
                packed, scale = quantised(packed.detach().flatten(0, 1))
                put(f"{name}_scale", scale)
            put(name, packed, wide=False)
        for name in ("up_bias", "gate_bias", "down_bias"):
            put(name, getattr(module, name))
        put("router", router.weight)
        put("router_bias", router.bias)
        put("order", router.order, wide=False)
        if not self._everything:
            at, active = module.dropped_at, router.active
            for name in ("dropped", "slopes"):
                table = getattr(module, name)
                if table is not None:
                    self._copied.append(table)
                    put(name, at_budget(table, at, active))
        inside = module.inside
        thin = inside is not None and not inside.all_live
        self._entry = self.few if thin else self.whole
        if not thin and self._everything:
            args.N, args.m = 1, args.N * args.m  # one expert: nothing to group
        if inside is not None:
            cut = -1.0 if inside.all_live else inside.threshold
            if not inside.selector.mean or isinstance(cut, Tensor):
                return None, []  # it counts: eager
            args.cut = cut
            put("centre", inside.centre)
            put("weigh", inside.scale)
            put("offset", module.offset)
        if router.selector.mean:
            threshold = router.threshold
            args.threshold = threshold if isinstance(threshold, float) else 0.0
            args.keep = -1
        else:
            args.keep = int(router.budget)
        return args, kept


_OWN = ("up", "gate", "down", "up_bias", "gate_bias", "down_bias", "dropped", "slopes")


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).float().contiguous()
