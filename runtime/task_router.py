"""A router on two levels: what the token is, and what task its sequence belongs to.

T2MIR (Wu et al., arXiv:2506.05426) routes by token and by task; here one router sees both:
``score = W x + V t`` with t an embedding of the task. ``V`` starts at zero, where it is the token
router. The embedding is set for a whole sequence before it runs (:func:`task`), and holds for every
token of it: so a generated token is routed as it would be in a full pass, which a mean over the
tokens seen so far would not do. :func:`pooled` makes an embedding from a context's activations,
and :func:`sparsify.runtime.losses.task_contrast` trains it to tell tasks apart.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.errors import BadInput
from sparsify.runtime.router import Router, as_parameter
from sparsify.runtime.spec import routed


@routed
class TaskRouter(Router):
    """A :class:`Router` whose scores also see an embedding of the task.

    Args:
        weight: (R, D); task_weight: (R, E), or its width E: zeros then.
        options: of :class:`Router`.

    The cost leaves the task's part out: it is computed once a sequence.

    Attributes:
        task: (B, E) or (E,), the present embedding; None = the token alone decides. Not saved.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        task_weight: Tensor | int,
        **options: Any,
    ) -> None:
        super().__init__(weight, bias, **options)
        if isinstance(task_weight, int):
            task_weight = weight.detach().new_zeros(weight.shape[0], task_weight)
        if task_weight.dim() != 2 or len(task_weight) != len(weight):
            raise BadInput(
                f"task weights must be ({len(weight)}, width), not {tuple(task_weight.shape)}"
            )
        self.task_weight = as_parameter(task_weight, self.weight.requires_grad)
        self.task: Tensor | None = None

    def scores(self, x: Tensor) -> Tensor:
        """x (B, T, D) or (..., D) -> (..., R)."""
        return self._with_task(super().scores(x))

    def task_scores(self, embedding: Tensor) -> Tensor:
        """(B, E) -> (B, R): what the task alone says."""
        return nn.functional.linear(embedding.to(self.task_weight), self.task_weight)

    def _with_task(self, scores: Tensor) -> Tensor:
        if self.task is None:
            return scores
        mine = self.task_scores(self.task).to(scores)
        if mine.dim() == 1:
            return scores + mine
        if scores.dim() != 3 or scores.shape[0] != len(mine):
            raise BadInput(
                f"embeddings of {len(mine)} tasks for scores {tuple(scores.shape)}",
                help="one embedding for all, or one per sequence of a (B, T, D) batch",
            )
        return scores + mine.unsqueeze(1)

    def options(self) -> dict[str, Any]:
        return {**super().options(), "task_width": self.task_weight.shape[1]}

    @classmethod
    def arguments(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        return {**super().arguments(options), "task_weight": options["task_width"]}


@contextlib.contextmanager
def task(model: nn.Module, embedding: Tensor) -> Iterator[None]:
    """Inside, the task routers of ``model`` see ``embedding`` (E,), or (B, E) one per sequence."""
    chosen = [m for m in model.modules() if isinstance(m, TaskRouter)]
    if not chosen:
        raise BadInput("the model has no task router")
    before = [router.task for router in chosen]
    try:
        for router in chosen:
            router.task = embedding
        yield
    finally:
        for router, old in zip(chosen, before, strict=True):
            router.task = old


def pooled(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """x (B, T, E) -> (B, E): the mean over a context's tokens; mask (B, T), nonzero = counts."""
    if mask is None:
        return x.mean(1)
    weight = (mask != 0).to(x.dtype).unsqueeze(-1)
    total: Tensor = (x * weight).sum(1) / weight.sum(1).clamp_min(torch.finfo(x.dtype).tiny)
    return total
