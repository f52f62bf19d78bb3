"""ffn-mot: give every modality its own feed-forward layer, chosen by the token's modality id.

Mixture-of-Transformers (Liang et al., arXiv:2411.04996): the layer is copied once per modality and
each token runs its own modality's copy; nothing is scored or learned to choose. The modality comes
from an input of the model (``ids=NAME``, integers (batch, tokens)) or from ranges of token ids
(``tokens=100-199``); attn-mot does the same for the projections of attention, which itself stays
global over all tokens. Norms stay shared.

At initialization the copies are equal: the dense layer on every token. Rows are grouped by
modality, and a matrix product may add in another order for another number of rows: REORDERED.
"""

from __future__ import annotations

import dataclasses

from sparsify.core import Pass, Rewrite, Splice, option
from sparsify.regions import FeedForward


@dataclasses.dataclass(frozen=True)
class FfnMot(Pass[FeedForward]):
    """Feed-forward layer -> one layer per modality."""

    ids: str = option("", "integer input (batch, tokens) that holds modality ids 0, 1, ...")
    tokens: str = option("", "token ids of modality 1/2/..., as 100-199/200-263; the rest are 0")
    modalities: int = option(2, "how many modalities ids= holds", ge=2, le=64)

    def check(self, ffn: FeedForward) -> None:
        from sparsify.passes._modality import source

        source(ffn, self.ids, self.tokens)

    def rewrite(self, ffn: FeedForward) -> Rewrite:
        from sparsify.passes._modality import count, ranges_of, source
        from sparsify.runtime.modality import ModalityFFN, copies
        from sparsify.weights import packed_ffn

        number = count(self.modalities, self.tokens)
        parts = (ffn.up, ffn.gate, ffn.down)
        weights = [copies(p.weight if p is not None else None, number) for p in parts]
        biases = [copies(p.bias if p is not None else None, number) for p in parts]
        up, gate, down = weights
        assert up is not None and down is not None
        module = ModalityFFN(
            up, gate, down, *biases, activation=ffn.activation, ranges=ranges_of(self.tokens)
        )
        port = source(ffn, self.ids, self.tokens)
        note = f"{number} copies, one per modality, chosen by {self.ids or self.tokens}"
        return Rewrite((Splice("mot", module, ("x", port), "ffn"),), packed_ffn(ffn, "mot"), note)
