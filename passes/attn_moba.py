"""attn-moba: let queries select blocks of keys; the other blocks are neither scored nor summed.

Mixture of Block Attention (MoBA, Lu et al., arXiv:2502.13189): keys lie in blocks, a query scores
the mean key of every block before its own and attends to its own block and the best others. Video
MoBA (VMoBA, Wu et al., arXiv:2506.23858): in a video's grid the blocks are runs of frames, columns
through all frames and cuboids, in turn over the layers (``grid``, ``tile``), and the queries of a
head select together, the best pairs (``global``) or as many as hold a share of the similarity
(``threshold``). Under a causal mask every query selects alone, whatever the selection.

The choice is hard and has no weights of its own: gradients flow through the live blocks, as in the
papers. At initialization all blocks are live, in other sums than before: REORDERED.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

from sparsify.core import Pass, Refused, Rewrite, Splice, option
from sparsify.errors import BadInput, BadOption
from sparsify.regions import Attention


@dataclasses.dataclass(frozen=True)
class AttnMoba(Pass[Attention]):
    """Attention -> attention to blocks of keys that each query selects."""

    moves_weights: ClassVar[bool] = False

    active: float = option(
        1.0, "fraction of the blocks that a query sees (threshold: of the similarity)", gt=0, le=1
    )
    block: int = option(64, "keys per block, where there is no grid", ge=1)
    selection: str = option(
        "top-k", "how blocks are selected", among=("top-k", "global", "threshold")
    )
    grid: str = option("", "sizes of the grid that the tokens fill, such as 8x8 or 4x8x8")
    tile: str = option("", "what a block spans along the axes of the grid, such as 2x4x4")

    def __post_init__(self) -> None:
        from sparsify.runtime.key_blocks import sizes_of

        axes = []
        for name in ("grid", "tile"):
            try:
                axes.append(len(sizes_of(str(getattr(self, name)))))
            except BadInput as error:
                message = f"option '{name}' of attn-moba: {error.what}"
                raise BadOption(message, help=error.help) from None
        if axes[0] != axes[1]:
            raise BadOption(
                f"attn-moba needs a tile for each axis of the grid: grid has {axes[0]}, tile "
                f"{axes[1]}",
                help="attn-moba{grid=4x8x8 tile=2x4x4}",
            )

    def check(self, attention: Attention) -> None:
        from sparsify.runtime.key_blocks import sizes_of
        from sparsify.runtime.spans import split_softmax

        if attention.cross:
            raise Refused("queries and keys are of different sequences: no block is a query's own")
        try:
            split_softmax(attention.score)
        except BadInput as error:
            raise Refused(str(error)) from None
        if not self.grid:
            return
        queries, keys = (attention.ports[name].meta["shape"][2] for name in "qk")
        if attention.causal or queries != keys:
            raise Refused(
                "it is causal: the mean key of a grid's block would hold keys after the query",
                suggestion="attn-moba without grid",
            )
        wanted = math.prod(sizes_of(self.grid))
        if keys < wanted:
            raise Refused(f"it sees {keys} keys, a grid of {self.grid} has {wanted}")

    def rewrite(self, attention: Attention) -> Rewrite:
        from sparsify.runtime.block_attend import BlockAttend
        from sparsify.runtime.key_blocks import sizes_of, tile_of_layer
        from sparsify.runtime.prefix import Prefix

        grid = sizes_of(self.grid)
        tile = tile_of_layer(grid, sizes_of(self.tile), attention.index) if grid else ()
        module = BlockAttend(
            attention.score,
            heads=attention.heads,
            kv_heads=attention.kv_heads,
            head_dim=attention.head_dim,
            value_dim=attention.value_dim,
            causal=attention.causal,
            block=self.block,
            selection=self.selection,
            grid=grid,
            tile=tile,
            budget=Prefix(UNITS),
        )
        operands = ("q", "k", "v", *attention.score_operands)
        return Rewrite((Splice("attend", module, operands, "attend"),), (), module.extra_repr())


UNITS = 64  # of the dial; only the share of live ones is read
