"""The routed feed-forward layer on CPU: one call from scores to the sum over live experts.

A few tokens (decoding) go through one C call: score, select, read the live experts' rows, activate,
add up, stand-ins for the dead. Many tokens are selected by the eager router, then two parallel
loops compute the neurons of live pairs and the outputs. Between the two, and wherever the dense
computation is faster, the plan decides (:mod:`sparsify.codegen.plan`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from sparsify.codegen.cpu.build import load
from sparsify.codegen.cpu.ffn_source import source
from sparsify.runtime.dropped import at_budget
from sparsify.runtime.ffn import RoutedFFN
from sparsify.runtime.router import Router

FEW = 16  # tokens up to which each weight row is read once for all of them
_FUSED = ("threshold", "top-k")  # rules that the kernel selects by itself

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


class FfnKernel:
    """The kernel of one RoutedFFN.

    Args:
        module: the layer it is for.
        choose: tokens -> ``few``, ``prefill``, or ``eager``, where the kernel declines.

    Raises:
        NoCompiler, CannotLower.
    """

    def __init__(self, module: RoutedFFN, choose: Callable[[int], str]) -> None:
        self.choose = choose
        thin = module.inside is not None
        gated = module.gate is not None
        library = load(
            source(module.activation, gated=gated, weights=module.up.dtype, thin=thin), "ffn"
        )
        self.few, self.prefill = library.few, library.prefill
        for entry in (self.few, self.prefill):
            entry.argtypes, entry.restype = (ctypes.c_void_p,), None
        self._key: tuple[Any, ...] = ()
        self._base = Arguments()
        self._kept: list[Tensor] = []  # what the pointers of _base point to

    def __deepcopy__(self, memo: Mapping[int, Any]) -> FfnKernel:
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__, _key=(), _kept=[])
        return twin

    def __call__(self, module: RoutedFFN, x: Tensor) -> Tensor | None:
        """x (..., D) -> (..., D), or None where eager has to run."""
        N, m, D = module._parameters["up"].shape  # type: ignore[union-attr]
        rows = x.reshape(-1, D)
        T = len(rows)
        way = self.choose(T) if x.device.type == "cpu" and T else "eager"
        if way == "eager":
            return None
        router = module.router
        everything = router.all_live
        fused = way == "few" and not everything and _fusable(router)
        args = self._arguments(module, router, everything)
        wide = rows if rows.dtype == torch.float32 else rows.float()
        wide = wide.contiguous()
        y = torch.empty_like(wide)
        select = scores = None
        if fused:
            scratch = wide.new_empty(T * (N + router.routed))
            select, scores = scratch[: T * N], scratch[T * N :]
        elif everything:
            select = wide.new_ones(T * N)
        else:
            scores = router.scores(x)
            select = router(x, scores).reshape(-1).float()
            scores = scores.reshape(-1).float()
        args.x, args.y, args.select = wide.data_ptr(), y.data_ptr(), select.data_ptr()
        args.scores = 0 if scores is None else scores.data_ptr()
        args.T, args.threads = T, torch.get_num_threads()
        if not fused:
            args.router = None
        stands = args.dropped or args.slopes
        inside = module.inside
        (self.few if way == "few" else self.prefill)(ctypes.addressof(args))
        module.counter.seen(T, N, args.live)
        module.counter.rows += args.live
        if inside is not None:
            inside._seen(T, args.live, args.thin)
            inside.counter.rows += args.thin
        if stands and way == "prefill" and args.live < T * N:
            for left, right in module._stand_ins(
                select.view(T, N) != 0, None if scores is None else scores.view(T, -1)
            ):
                y = torch.addmm(y, left.to(y.dtype), right.to(y.dtype))
        return y.to(x.dtype).view(x.shape)

    def _arguments(self, module: RoutedFFN, router: Router, everything: bool) -> Arguments:
        """All that does not depend on the call, from the cache while nothing has changed."""
        own, its = module._parameters, router._parameters
        inside = module.inside
        tensors = [own.get(n) for n in _OWN]
        tensors += [its["weight"], its["bias"], router._buffers.get("order")]
        if inside is not None:
            tensors += [own.get("offset"), inside.scale, inside.centre]
        key = (
            everything,
            router.active,
            None if inside is None else inside.setting,
            *[None if t is None else (t.data_ptr(), _version(t)) for t in tensors],
        )
        if key != self._key:
            self._base, self._kept = self._read(module, router, everything)
            self._key = key
        args = Arguments.from_buffer_copy(self._base)
        selector = router.selector
        if selector.mean:
            threshold = router.threshold
            args.threshold = threshold if isinstance(threshold, float) else 0.0
            args.keep = -1
        else:
            args.keep = int(router.budget)
        if inside is not None:
            args.cut = inside.threshold if not inside.all_live else -1.0
        return args

    def _read(
        self, module: RoutedFFN, router: Router, everything: bool
    ) -> tuple[Arguments, list[Tensor]]:
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

        for name in ("up", "gate", "down"):
            put(name, getattr(module, name), wide=False)
        for name in ("up_bias", "gate_bias", "down_bias"):
            put(name, getattr(module, name))
        put("router", router.weight)
        put("router_bias", router.bias)
        put("order", router.order, wide=False)
        if not everything:
            at, active = module.dropped_at, router.active
            if module.dropped is not None:
                put("dropped", at_budget(module.dropped, at, active))
            if module.slopes is not None:
                put("slopes", at_budget(module.slopes, at, active))
        inside = module.inside
        if inside is not None:
            put("centre", inside.centre)
            put("weigh", inside.scale)
            put("offset", module.offset)
        return args, kept


_OWN = ("up", "gate", "down", "up_bias", "gate_bias", "down_bias", "dropped", "slopes")


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _fusable(router: Router) -> bool:
    """Whether the kernel can score and select as the router does."""
    return (
        type(router) is Router
        and router.rule in _FUSED
        and router.unit_weights
        and not router.keep
        and router.steer is None
        and router.extra is None
        and router.correction is None
        and not router._forward_hooks
        and not (router.selector.mean and not isinstance(router.threshold, float))
    )
