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
from sparsify.errors import BadOption
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
        axes = {name: len(_sizes(name, getattr(self, name))) for name in ("grid", "tile")}
        if axes["grid"] != axes["tile"]:
            raise BadOption(
                "attn-moba needs a tile with as many sizes as the grid",
                why=f"grid has {axes['grid']}, tile {axes['tile']}",
                help="attn-moba{grid=4x8x8 tile=2x4x4}",
            )

    def check(self, attention: Attention) -> None:
        from sparsify.passes._spans import check_softmax

        if attention.cross:
            raise Refused("queries and keys are of different sequences: no block is a query's own")
        check_softmax(attention)
        if not self.grid:
            return
        queries, keys = (attention.ports[name].meta["shape"][2] for name in "qk")
        if attention.causal or queries != keys:
            raise Refused(
                "it is causal: the mean key of a grid's block would hold keys after the query",
                suggestion="attn-moba without grid",
            )
        wanted = math.prod(_sizes("grid", self.grid))
        if keys < wanted:
            raise Refused(f"it sees {keys} keys, a grid of {self.grid} has {wanted}")

    def rewrite(self, attention: Attention) -> Rewrite:
        from sparsify.runtime.block_attend import BlockAttend
        from sparsify.runtime.key_blocks import tile_of_layer
        from sparsify.runtime.prefix import Prefix

        grid, tile = _sizes("grid", self.grid), _sizes("tile", self.tile)
        if grid:
            tile = tile_of_layer(grid, tile, attention.index)
        module = BlockAttend(
            attention.score,
            **attention.sizes,
            block=self.block,
            selection=self.selection,
            grid=grid,
            tile=tile,
            budget=Prefix(UNITS),
        )
        operands = ("q", "k", "v", *attention.score_operands)
        return Rewrite((Splice("attend", module, operands, "attend"),), (), module.extra_repr())


UNITS = 64  # of the dial; only the share of live ones is read


def _sizes(name: str, text: str) -> tuple[int, ...]:
    """``4x8x8`` as numbers; empty where the text is."""
    parts = text.split("x") if text else []
    numbers = all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts)
    if len(parts) not in (0, 2, 3) or not numbers:
        raise BadOption(
            f"option '{name}' of attn-moba cannot be '{text}'",
            help="two or three sizes: 8x8 or 4x8x8",
        )
    return tuple(map(int, parts))
