"""attn-mot: give every modality its own query, key, value and output projections.

Mixture-of-Transformers (Liang et al., arXiv:2411.04996): the projections of attention are copied
once per modality and each token is multiplied by its own modality's; attention itself stays global
over all tokens. The modality is told as in ffn-mot: ``ids=NAME`` of an input of the model, or
``tokens=`` ranges of token ids. Norms stay shared.

At initialization the copies are equal: REORDERED (rows are grouped by modality, and a matrix
product may add in another order for another number of rows).
"""

from __future__ import annotations

import dataclasses

from sparsify.core import Moved, Pass, Refused, Rewrite, Splice, option
from sparsify.regions import Projection

ROLES = frozenset(("query", "key", "value", "output"))


@dataclasses.dataclass(frozen=True)
class AttnMot(Pass[Projection]):
    """Projection of an attention -> one projection per modality."""

    ids: str = option("", "integer input (batch, tokens) that holds modality ids 0, 1, ...")
    tokens: str = option("", "token ids of modality 1/2/..., as 100-199/200-263; the rest are 0")
    modalities: int = option(2, "how many modalities ids= holds", ge=2, le=64)

    def check(self, projection: Projection) -> None:
        from sparsify.passes._modality import source

        if not set(projection.role.split("+")) <= ROLES:
            raise Refused("no projection of an attention", suggestion="ffn-mot")
        if projection.time_major:
            raise Refused("its rows run over (tokens, batch), modality ids over (batch, tokens)")
        source(projection, self.ids, self.tokens)

    def rewrite(self, projection: Projection) -> Rewrite:
        from sparsify.passes._modality import count, ranges_of, source
        from sparsify.runtime.modality import ModalityLinear, copies

        number = count(self.modalities, self.tokens)
        linear = projection.linear
        weight, bias = copies(linear.weight, number), copies(linear.bias, number)
        assert weight is not None
        module = ModalityLinear(weight, bias, ranges=ranges_of(self.tokens))
        base = f"{projection.path.split('#')[0]}.mot".lstrip(".")
        how = f"copied {number} times"
        moved = [
            Moved(linear.weight_name, f"{base}.weight", how, "weight", linear.transposed),
        ]
        if linear.bias_name is not None:
            moved.append(Moved(linear.bias_name, f"{base}.bias", how, "bias"))
        port = source(projection, self.ids, self.tokens)
        note = f"{projection.role}: {number} copies, one per modality"
        return Rewrite((Splice("mot", module, ("x", port), "projection"),), tuple(moved), note)
