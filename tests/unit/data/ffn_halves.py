"""ffn-halves: split each feed-forward layer into two experts, its first and second half."""

import dataclasses

from sparsify import FeedForward, Pass, Refused, Rewrite, Splice, option


@dataclasses.dataclass(frozen=True)
class FfnHalves(Pass[FeedForward]):
    active: float = option(1.0, "fraction of experts that a token uses", gt=0, le=1)

    def check(self, ffn: FeedForward) -> None:
        if ffn.hidden % 2:
            raise Refused(f"{ffn.hidden} hidden neurons do not divide into two halves")

    def rewrite(self, ffn: FeedForward) -> Rewrite:
        from sparsify.runtime.ffn import RoutedFFN
        from sparsify.runtime.router import Router
        from sparsify.weights import packed_ffn

        router = Router(ffn.up.weight.new_zeros(2, ffn.width))  # yours goes here
        gate, gate_bias = (ffn.gate.weight, ffn.gate.bias) if ffn.gate else (None, None)
        module = RoutedFFN.from_dense(
            ffn.up.weight, gate, ffn.down.weight, ffn.up.bias, gate_bias, ffn.down.bias,
            experts=2, activation=ffn.activation, router=router,
        )  # fmt: skip
        splice = Splice("halves", module, inputs=("x",), site="ffn")
        return Rewrite((splice,), packed_ffn(ffn, "halves"), note="two halves")
