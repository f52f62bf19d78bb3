"""Calibration data for a captured model, from whatever the user has, in one pass over it.

Text becomes blocks of tokens for a language model and sentences for an encoder. A stream of tensors
(or of mappings from argument to tensor, as data loaders give them) is read to its end, batch by
batch; what regions keep is a reservoir of fixed size (:mod:`sparsify.calibrate`), and what the
sparse model settles on later are the first sequences of one length.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from sparsify.calibrate import Progress, collect
from sparsify.corpus import token_text
from sparsify.errors import BadInput
from sparsify.regions import Region
from sparsify.runtime.calling import CallSpec
from sparsify.sentences import arguments_of, longest, reads_text, sentences

TOKENS = 8192  # of a text
SETTLE_TOKENS = 4096  # of those, one batch that the sparse model is settled on
BLOCK = 256  # tokens per sequence
LEAST = 32  # tokens of a text; fewer say nothing about anything

Source = str | Path | Sequence[str] | Iterable[Tensor] | Iterable[Mapping[str, Tensor]]
Arguments = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Calibrated:
    """What regions were fitted on.

    Attributes:
        name: of the text; None where nothing was asked for.
        tokens: seen.
        settle: flat graph inputs of two batches, the second half as large; empty without data.
    """

    name: str | None = None
    tokens: int = 0
    settle: tuple[list[Tensor], ...] = ()


def calibrate(
    gm: fx.GraphModule,
    call: CallSpec,
    wants: Sequence[tuple[Region, Mapping[str, int]]],
    source: Source,
    tokenizer: Any,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> Calibrated:
    """Fill the samples of regions.

    Args:
        gm: the captured graph; call: from arguments to its inputs.
        wants: as :func:`sparsify.calibrate.collect` takes them.
        source: a built-in text, a file, an iterable of texts, of token ids, or of mappings.
        tokenizer: for texts.
        seed: of what is sampled.

    Raises:
        BadInput: no text, too little of it, or what the model does not take.
    """
    if not wants:
        return Calibrated()
    name, batches, total, alike = _data(source, call, tokenizer, seed)
    keeper = _Keeper(call, alike)
    tokens = collect(
        gm, wants, keeper.flat(batches), seed=seed, progress=progress, total=total,
        predicts=call.kind == "causal-lm",
    )  # fmt: skip
    if not tokens:
        raise BadInput("there is no calibration data", help="a text, or batches of token ids")
    return Calibrated(name, tokens, keeper.settle())


def _data(
    source: Any, call: CallSpec, tokenizer: Any, seed: int
) -> tuple[str, Iterable[Arguments], int, Arguments | None]:
    """(name, batches, how many if known, what to settle on if that is not their beginning)."""
    if not isinstance(source, str | Path | Tensor | Sequence):
        stream = iter(source)
        first = next(stream, None)
        source = itertools.chain([] if first is None else [first], stream)
    else:
        first = source[0] if isinstance(source, Sequence) and source else source
    if isinstance(first, Mapping):
        return "batches", map(_checked, source), 0, None
    if call.kind != "causal-lm" and not isinstance(first, Tensor):
        captured = getattr(call, "captured", {})
        if tokenizer is not None and not reads_text(captured):
            raise BadInput(
                "this model does not read text",
                help="calibrate with batches: mappings from argument to tensor",
            )
        found = sentences(source, tokenizer, captured, limit=TOKENS, seed=seed,
                          most=longest(call.slots))  # fmt: skip
        _enough(found.tokens)
        ids = found.alike(SETTLE_TOKENS)
        settle = arguments_of(ids, captured)
        return found.name, found.batches, len(found.batches), settle
    text = token_text(source, tokenizer, length=BLOCK, limit=TOKENS, seed=seed)
    batches = text.batches
    if isinstance(batches, list):
        _enough(sum(ids.numel() for ids in batches))
    total = len(batches) if isinstance(batches, list) else 0
    names = list(getattr(call, "captured", ("input_ids",)))
    return text.name, (arguments_of(ids, names) for ids in batches), total, None


def _enough(tokens: int) -> None:
    if tokens < LEAST:
        raise BadInput(
            "the text is too short to calibrate on", why=f"{tokens} tokens, {LEAST} at least",
            help="a few thousand tokens of text like that which the model will see",
        )  # fmt: skip


def _checked(value: Any) -> Arguments:
    if not isinstance(value, Mapping) or not all(isinstance(v, Tensor) for v in value.values()):
        raise BadInput(
            f"a {type(value).__name__} is no batch", help="a mapping from argument to tensor"
        )
    return dict(value)


class _Keeper:
    """Flattens batches one by one, and keeps the first rows of one shape to settle on."""

    def __init__(self, call: CallSpec, alike: Arguments | None) -> None:
        self.call = call
        self.given = alike
        self.kept: list[Arguments] = []
        self.tokens = 0

    def flat(self, batches: Iterable[Arguments]) -> Iterator[tuple[list[Tensor], Tensor | None]]:
        for batch in batches:
            self._keep(batch)
            mask = batch.get("attention_mask")
            padded = mask is not None and not bool((mask != 0).all())
            yield self.call.flatten((), batch), mask if padded else None

    def _keep(self, batch: Arguments) -> None:
        if self.given is not None or self.tokens >= SETTLE_TOKENS:
            return
        if self.kept and _shapes(self.kept[0]) != _shapes(batch):
            return
        self.kept.append(batch)
        first = next(iter(batch.values()))
        self.tokens += first.shape[0] * (first.shape[1] if first.dim() == 2 else 1)

    def settle(self) -> tuple[list[Tensor], ...]:
        """Two batches as flat inputs."""
        found = self.given
        if found is None:
            names = self.kept[0]
            found = {name: torch.cat([batch[name] for batch in self.kept]) for name in names}
        first = next(iter(found.values()))
        length = first.shape[1] if first.dim() == 2 else 1
        rows = max(SETTLE_TOKENS // length, 1)
        sizes = (rows, max(rows // 2, 1))
        return tuple(
            self.call.flatten((), {name: value[:n] for name, value in found.items()}) for n in sizes
        )


def _shapes(batch: Arguments) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape[1:]) for name, value in batch.items()}
