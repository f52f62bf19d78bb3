"""What a routed feed-forward layer is made of, as JSON, and what it costs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsify.errors import BadInput
from sparsify.runtime.cost import Cost
from sparsify.runtime.inside import LiveNeurons
from sparsify.runtime.program import Program
from sparsify.runtime.router import Router
from sparsify.runtime.spec import dtype_name, dtype_of, nested

if TYPE_CHECKING:
    from sparsify.runtime.ffn import RoutedFFN


def options_of(ffn: RoutedFFN) -> dict[str, Any]:
    """The layer as JSON."""
    return {
        "experts": ffn.experts,
        "hidden": ffn.hidden,
        "width": ffn.width,
        "dtype": dtype_name(ffn.up.dtype),
        "gate": ffn.gate is not None,
        "up_bias": ffn.up_bias is not None,
        "gate_bias": ffn.gate_bias is not None,
        "down_bias": ffn.down_bias is not None,
        "dropped": ffn.dropped is not None,
        "slopes": ffn.slopes is not None,
        "dropped_at": list(ffn.dropped_at),
        "order": ffn.order is not None,
        "copies": ffn.copies,
        "activation": ffn.activation.to_json(),
        "router": ffn.router.spec(),
        **({} if ffn.inside is None else {"inside": ffn.inside.spec()}),
    }


def parts_of(options: Mapping[str, Any]) -> tuple[tuple[Tensor | None, ...], dict[str, Any]]:
    """Arguments of the layer that :func:`options_of` described, weights uninitialised."""
    n, m, d = options["experts"], options["hidden"], options["width"]
    at = options["dropped_at"]
    dtype = dtype_of(options["dtype"])
    rows = [len(at)] if at else []

    def empty(*shape: int, given: str = "") -> Tensor | None:
        return torch.empty(shape, dtype=dtype) if not given or options[given] else None

    tensors = (
        empty(n, m, d),
        empty(n, m, d, given="gate"),
        empty(n, m, d),
        empty(n, m, given="up_bias"),
        empty(n, m, given="gate_bias"),
        empty(d, given="down_bias"),
    )
    rest = {
        "activation": Program.from_json(options["activation"]),
        "router": nested(options["router"], Router),
        "dropped": empty(*rows, n, d, given="dropped"),
        "slopes": empty(*rows, options["router"]["routed"], d, given="slopes"),
        "dropped_at": at,
        "order": torch.empty(n * m, dtype=torch.int64) if options["order"] else None,
        "copies": options["copies"],
    }
    if options.get("inside") is not None:
        rest["inside"] = nested(options["inside"], LiveNeurons)
    return tensors, rest


def cost_of(ffn: RoutedFFN, active: float | None) -> Cost:
    """Of one token, with the share ``active`` of the experts; None = as the router is set."""
    router = ffn.router
    live = router.live_units(router.active if active is None else active)
    size = ffn.up.element_size()
    read = 1.0 if ffn.inside is None else ffn.inside.active  # of a live expert's rows of down
    per_unit = ffn.hidden * ffn.width * (1 + (ffn.gate is not None) + read)
    total = Cost(2 * live * per_unit, live * per_unit * size) + router.cost(active)
    biases = [b for b in (ffn.up_bias, ffn.gate_bias) if b is not None]
    extra = sum(b.shape[1] for b in biases) * live
    extra += 0 if ffn.down_bias is None else ffn.width
    units = 0
    if live < ffn.experts:
        units += 0 if ffn.dropped is None else ffn.experts
        units += 0 if ffn.slopes is None else router.routed
    if read < 1 and ffn.offset is not None:
        units += ffn.experts
    total += Cost(2 * units * ffn.width, units * ffn.width * size)
    return total + Cost(0, extra * size)


def check_parts(
    up: Tensor, gate: Tensor | None, down: Tensor, activation: Program, r: Router
) -> None:
    """BadInput unless the pieces fit."""
    gates = () if gate is None else (gate,)
    if up.dim() != 3 or any(t.shape != up.shape for t in (down, *gates)):
        shapes = ", ".join(str(tuple(t.shape)) for t in (up, *gates, down))
        raise BadInput(f"up, gate and down of a routed FFN must all be (N, m, D), not {shapes}")
    if len(activation.inputs) != 1 + len(gates):
        raise BadInput(
            f"the activation takes {len(activation.inputs)} values, the layer has {1 + len(gates)}"
        )
    if r.units != up.shape[0]:
        raise BadInput(f"a router of {r.units} units cannot route {up.shape[0]} experts")
