"""Quality of encoders: are a sentence's embedding and its neighbours still the dense model's?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsify import contenders, contest
from sparsify.bootstrap import RESAMPLES, Bootstrap
from sparsify.contenders import BASELINES, Contender, Run
from sparsify.errors import BadInput
from sparsify.report import EmbeddingRow, Embeddings
from sparsify.sentences import Batch, Sentences

POOLINGS = ("mean", "first")
TOP = 10
_AT_ONCE = 256  # rows of the similarity matrix in memory


def vectors_of(output: Any) -> Tensor:
    """(batch, token, width) in an encoder's output: a tensor, ``last_hidden_state`` or the first.

    Raises:
        BadInput: there is none.
    """
    found = output
    if isinstance(output, Mapping):
        found = output.get("last_hidden_state")
    elif not isinstance(output, Tensor):
        found = getattr(output, "last_hidden_state", None)
        if found is None and isinstance(output, Sequence) and output:
            found = output[0]
    if not isinstance(found, Tensor) or found.dim() != 3:
        raise BadInput(
            "the model gives no token vectors (batch, token, width)",
            why=f"its output is a {type(output).__name__}",
        )
    return found


def embedded(vectors: Tensor, pooling: str = "mean") -> Tensor:
    """vectors (batch, token, width) of unpadded sentences -> (batch, width) of length one."""
    pooled = vectors.float().mean(1) if pooling == "mean" else vectors[:, 0].float()
    return nn.functional.normalize(pooled, dim=-1)


def nearest(embeddings: Tensor, top: int) -> Tensor:
    """embeddings (n, width) -> int64 (n, top): the nearest other rows by cosine."""
    found = []
    for start in range(0, len(embeddings), _AT_ONCE):
        part = embeddings[start : start + _AT_ONCE] @ embeddings.T
        rows = torch.arange(len(part))
        part[rows, start + rows] = -torch.inf
        found.append(part.topk(top, dim=1).indices)
    return torch.cat(found)


def shared(mine: Tensor, theirs: Tensor) -> Tensor:
    """Two (n, top) of rows -> (n,): the share of the first that is among the second."""
    return (mine.unsqueeze(2) == theirs.unsqueeze(1)).any(2).float().mean(1)


def embeddings(
    model: nn.Module,
    text: Sentences,
    *,
    active: Sequence[float] = (1.0, 0.75, 0.5),
    calibration: Sequence[Batch] = (),
    run: Run,
    pass_name: str | None = None,
    baselines: Sequence[str] = BASELINES,
    top: int = TOP,
    pooling: str = "mean",
    resamples: int = RESAMPLES,
    seed: int = 0,
    progress: contest.Progress | None = None,
) -> Embeddings:
    """The routed model at several budgets, beside the dense model and the baselines.

    Args:
        text: sentences; calibration: batches of others, for the baselines.
        run: how to call the model on a batch.
        top: neighbours, of the others among these sentences; pooling: one of POOLINGS.
        Others as :func:`sparsify.evaluate.quality` takes them.
    """
    if pooling not in POOLINGS:
        raise BadInput(f"pooling cannot be '{pooling}'", help=f"one of: {', '.join(POOLINGS)}")
    if not 0 < top < text.count:
        raise BadInput(f"{text.count} sentences have no {top} nearest others", help="a smaller top")

    def measure(
        reference: Run,
        others: Mapping[str, Run],
        items: Sequence[Batch],
        progress: Callable[[int], None] | None,
    ) -> dict[str, Tensor]:
        runs = {"dense": reference, **others}
        found: dict[str, list[Tensor]] = {name: [] for name in runs}
        done = 0
        with torch.no_grad():
            for batch in items:
                for name, call in runs.items():
                    found[name].append(embedded(vectors_of(call(batch)), pooling).cpu())
                done += len(batch["input_ids"])
                if progress is not None:
                    progress(done)
        return {name: torch.cat(parts) for name, parts in found.items()}

    few = contenders.first_tokens(text.batches[:: max(len(text.batches) // 16, 1)])
    with torch.no_grad():
        whole = measure(contenders.dense_run(model, run), {}, few, None)["dense"]
    held = contest.hold(
        model, run, text.batches, measure, lambda mine: -float((mine * whole).sum(1).mean()),
        active=active, calibration=calibration, pass_name=pass_name, baselines=baselines, few=few,
        total=text.count, progress=progress,
    )  # fmt: skip
    drawn = Bootstrap(text.texts, row="sentences", resamples=resamples, seed=seed)
    dense = held.results["dense"]
    near = nearest(dense, top)

    def row(who: Contender) -> EmbeddingRow:
        mine = held.results[who.name]
        cosine = (mine * dense).sum(1).clamp(-1, 1)
        same = shared(nearest(mine, top), near)
        return EmbeddingRow(
            who.who, who.active, who.realised(), float(cosine.mean()), float(cosine.min()),
            float(same.mean()), who.note, who.flops(), drawn.mean(cosine), drawn.mean(same),
        )  # fmt: skip

    rows = [EmbeddingRow("dense", 1.0, None, 1.0, 1.0, 1.0)]
    rows += [row(c) for a in active for c in held.at(a)]
    return Embeddings(text.name, text.count, text.tokens, top, pooling, tuple(rows), drawn.facts)
