"""attn-mla: project keys and values through one low-rank latent, its rank on the dial.

Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434) for pretrained attention: the stacked
weights ``[W_k; W_v]`` (rows R) become ``U (U^T [W_k; W_v])`` with orthonormal U, the left singular
vectors of ``[W_k; W_v] C^(1/2)``, where C is the second moment of the layer's inputs on calibration
data (the identity without): the best rank-r approximation of keys and values on such inputs is the
first r columns (Eckart-Young). Only the projections are factorised: what follows them (norms,
rotary position embedding) sees whole keys, and the cache holds keys and values as before: the
smaller cache of the paper needs a rotary part beside the latent, which these models do not have.

At full rank the product is the dense projection up to rounding: BOUNDED.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

from sparsify.core import BOUNDED, Moved, Pass, Refused, Rewrite, Splice, option
from sparsify.regions import Attention, Projection

if TYPE_CHECKING:
    from torch import Tensor

TOKENS = 8192  # calibration tokens kept per layer


@dataclasses.dataclass(frozen=True)
class AttnMla(Pass[Attention]):
    """Key and value projections -> one latent and an up projection."""

    claim = BOUNDED(1e-5)

    active: float = option(1.0, "fraction of the full rank that is live", gt=0, le=1)

    def check(self, attention: Attention) -> None:
        from sparsify.passes._lowrank import check_wide

        parts = self._parts(attention)
        check_wide(parts[0].linear.weight)
        for part in parts:
            if part.rewritten_by is not None or part.blocked is not None:
                raise Refused(part.blocked or f"{part.path} is rewritten by {part.rewritten_by}")
        if len({part.ports["x"] for part in parts}) > 1:
            raise Refused("keys and values are projected from different inputs: no common latent")
        if "query" in parts[0].role and attention.query_rows is None:
            raise Refused("the query rows of the fused projection cannot be told apart")

    def _parts(self, attention: Attention) -> list[Projection]:
        """The projections that hold keys and values; Refused where they are not one or two."""
        parts = [p for p in attention.parts if {"key", "value"} & set(p.role.split("+"))]
        roles = sorted(role for p in parts for role in p.role.split("+") if role != "query")
        if roles != ["key", "value"]:
            raise Refused(
                "key and value are not one projection each: another layer holds them, or several"
            )
        if len(parts) == 2 and any("query" in p.role for p in parts):
            raise Refused("the queries share a projection with keys or values alone")
        return parts

    def taps(self, region: Attention) -> Mapping[str, int]:
        comparable = "stream" in region.ports and not region.time_major  # rows in one order
        return {"x": TOKENS} | ({"stream.energy": TOKENS} if comparable else {})

    def rewrite(self, attention: Attention) -> Rewrite:
        import torch

        from sparsify.runtime.latent import Features, LatentProjection
        from sparsify.runtime.prefix import Prefix

        parts = self._parts(attention)
        weights = torch.cat([p.linear.weight.detach() for p in parts])
        biases = [
            p.linear.bias.detach()
            if p.linear.bias is not None
            else weights.new_zeros(len(p.linear.weight))
            for p in parts
        ]
        has_bias = any(p.linear.bias is not None for p in parts)
        others = weights.new_zeros(0, weights.shape[1])
        places, rows = None, weights
        if "query" in parts[0].role:
            assert attention.query_rows is not None  # check
            mine = torch.ones(len(weights), dtype=torch.bool)
            mine[attention.query_rows.flatten()] = False
            places = torch.cat([mine.nonzero().flatten(), (~mine).nonzero().flatten()])
            rows, others = weights[mine], weights[~mine]
        up, down, errors = factors(rows, attention, parts[0])
        trains = any(p.linear.weight.requires_grad for p in parts)
        rank = Prefix(len(down), errors=errors, unit_cost=float(sum(rows.shape)))
        ends = [0]
        for part in parts:
            ends.append(ends[-1] + len(part.linear.weight))
        pieces = {p.role: (a, b) for p, a, b in zip(parts, ends[:-1], ends[1:], strict=True)}
        module = LatentProjection(
            up.to(rows.dtype).requires_grad_(trains),
            down.to(rows.dtype).requires_grad_(trains),
            others.requires_grad_(trains),
            torch.cat(biases).requires_grad_(trains) if has_bias else None,
            rank=rank,
            pieces=pieces,
            places=places,
        )
        note = f"rank {len(down)} for {len(rows)} rows, " + (
            "fitted to calibration data" if "x" in attention.samples else "from weights"
        )
        splices = [Splice("latent", module, (f"{parts[0].role}.x",))]
        if len(parts) == 1:
            splices = [dataclasses.replace(splices[0], site=parts[0].role)]
        else:
            splices += [
                Splice(f"latent_{role}", Features(a, b), ("latent",), role)
                for role, (a, b) in pieces.items()
            ]
        length = weights.shape[1] + len(down)
        return Rewrite(tuple(splices), moved(attention, parts), note, length=length)


def factors(
    rows: Tensor, attention: Attention, part: Projection
) -> tuple[Tensor, Tensor, Tensor | None]:
    """up (K, R) orthonormal and down (R, in) of ``rows`` (K, in), R = min(K, in), float64.

    The error table (what the last ranks carry, relative to the stream) where calibrated.
    """
    from sparsify.passes._lowrank import weighted_svd
    from sparsify.runtime.budget import error_table

    weight = rows.double()
    width = weight.shape[1]
    x = attention.samples.get("x")
    if part.ports["x"] is not attention.ports["x"]:
        x = None  # cross attention projects its keys from elsewhere
    left, values = weighted_svd(weight, x)
    size = min(len(weight), width)
    up = left[:, :size]
    errors = None
    energy = attention.samples.get("stream.energy")
    if x is not None and energy is not None:
        stream = float(energy.double().mean().clamp_min(1e-30))
        errors = error_table(values[:size].square().flip(0), 1 / stream)
    return up, up.T @ weight, errors


def moved(attention: Attention, parts: list[Projection]) -> tuple[Moved, ...]:
    """The weight map."""
    base = f"{attention.path.split('#')[0]}.latent".lstrip(".")
    found = []
    for part in parts:
        linear = part.linear
        how = "rows of up @ down" + (", query rows beside them" if "query" in part.role else "")
        found.append(Moved(linear.weight_name, f"{base}.up", how, part.role, linear.transposed))
        if linear.bias_name is not None:
            found.append(Moved(linear.bias_name, f"{base}.bias", "rows", f"{part.role}_bias"))
    return tuple(found)
