"""What healing minimizes: the distance of the routed model from the dense one it came from.

``kl * KL(dense || routed)`` on the next-token distributions (Hinton et al., arXiv:1503.02531, at
temperature 1), plus ``mse`` times the mean over regions of ``|y - y_dense|^2 / |y_dense|^2``, where
y is what a region's last routed module gives in either run (layer-wise hints as in FitNets,
arXiv:1412.6550; the relative error makes layers of different scale count alike), plus ``ce`` times
the cross entropy with the text.

The teacher is the model itself at its dense limit without adapters, so there is no second copy; it
needs one as soon as the moved weights themselves train.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.errors import BadInput
from sparsify.evaluate import logits_of
from sparsify.runtime import lora
from sparsify.runtime.model import next_token_loss
from sparsify.runtime.spec import RoutedModule
from sparsify.static_pruning import all_live

_POSITIONS = 64  # log-probabilities of this many positions at a time
_TINY = torch.finfo(torch.float32).tiny
IGNORED = -100  # the label of tokens that do not count


class _Divergence(torch.autograd.Function):
    """Mean KL(teacher || student) over rows of logits, with its gradient, a few rows at a time."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        """Both (n, V) -> ()."""
        total = student.new_zeros((), dtype=torch.float64)
        gradient = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        for start in range(0, len(student), _POSITIONS):
            part = slice(start, start + _POSITIONS)
            mine = student[part].float().log_softmax(-1)
            theirs = teacher[part].float().log_softmax(-1)
            wanted = theirs.exp()
            total += (wanted * (theirs - mine)).nansum(dtype=torch.float64)  # 0 * (-inf - x) is 0
            if gradient is not None:
                gradient[part] = ((mine.exp() - wanted) / len(student)).to(student.dtype)
        ctx.gradient = gradient
        return (total / max(len(student), 1)).float()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        """The gradient was made on the way forward: (softmax(student) - softmax(teacher)) / n."""
        return ctx.gradient * grad.to(ctx.gradient.dtype), None


def divergence(student: Tensor, teacher: Tensor, counts: Tensor | None = None) -> Tensor:
    """Mean KL(teacher || student) in nats over the positions that count.

    Memory: the logits, one gradient of their size, and the log-probabilities of 64 positions.

    Args:
        student, teacher: logits (..., V); no gradient goes to the teacher.
        counts: bool (...), which positions count; None = all.
    """
    mine, theirs = student.flatten(0, -2), teacher.detach().flatten(0, -2)
    if counts is not None:
        mine, theirs = mine[counts.flatten()], theirs[counts.flatten()]
    found: Tensor = _Divergence.apply(mine, theirs)  # type: ignore[no-untyped-call]
    return found


def results(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> the routed module whose output is the result of a region.

    Where a region became several routed modules (query, attend, output), that is the last of them:
    the others' outputs hold zeros for dead units, which nothing could bring nearer to the dense.
    """
    last: dict[str, tuple[str, nn.Module]] = {}
    for node in getattr(model, "graph").graph.nodes:  # noqa: B009  (SparseModel's, or its twin's)
        if node.op == "call_module":
            module = model.get_submodule(node.target)
            parts = (m for m in module.modules() if isinstance(m, RoutedModule))
            if any(getattr(type(m), "counts", True) for m in parts):  # routers alone count nothing
                last[str(node.target).rpartition(".")[0]] = (str(node.target), module)
    return dict(last.values())


@dataclasses.dataclass
class Distiller:
    """The loss of a routed model beside its dense teacher.

    Args:
        model: what trains, with the budget it is to be healed at.
        kl, mse, ce: how much each part counts; parts that count 0 are not computed.
        teacher: a dense model called like ``model``; None = the model itself at its dense limit,
            without its adapters. That is right as long as none of the weights in use there train.
        half: both run under autocast to bfloat16; weights and their gradients stay as they are.
    """

    model: nn.Module
    kl: float = 1.0
    mse: float = 1.0
    ce: float = 0.0
    teacher: nn.Module | None = None
    half: bool = False

    def __call__(self, **inputs: Any) -> tuple[Tensor, dict[str, float]]:
        """(loss, its parts) on one batch.

        Args:
            inputs: what the model is called with; ``labels`` (token ids, -100 where a token does
                not count) and ``attention_mask`` say which positions count.
        """
        labels = inputs.pop("labels", None)
        mask = inputs.get("attention_mask")
        inputs.setdefault("use_cache", False)
        mine: dict[str, Tensor] = {}
        theirs: dict[str, Tensor] = {}
        with (
            torch.no_grad(),
            self.dense() as teacher,
            _taps(teacher, theirs, bool(self.mse)),
            self._cast(),
        ):
            wanted = logits_of(teacher(**inputs))
        # a context of its own: a weight that is cast without gradients is kept until the end of one
        with _taps(self.model, mine, bool(self.mse)), self._cast():
            logits = logits_of(self.model(**inputs))
        counts = _counting(labels, mask, logits)
        loss = logits.new_zeros((), dtype=torch.float32)
        parts: dict[str, float] = {}
        if self.kl:
            kl = divergence(logits, wanted, counts)
            loss, parts["kl"] = loss + self.kl * kl, float(kl.detach())
        if self.mse:
            mse = relative_error(mine, theirs)
            loss, parts["mse"] = loss + self.mse * mse, float(mse.detach())
        if self.ce:
            ids = inputs["input_ids"] if labels is None else labels
            if labels is None and mask is not None:
                ids = ids.masked_fill(mask == 0, IGNORED)
            ce = next_token_loss(logits, ids)
            loss, parts["ce"] = loss + self.ce * ce, float(ce.detach())
        return loss, parts

    def _cast(self) -> contextlib.AbstractContextManager[Any]:
        if not self.half:
            return contextlib.nullcontext()
        device = next(self.model.parameters()).device.type
        return torch.autocast(device, dtype=torch.bfloat16)

    @contextlib.contextmanager
    def dense(self) -> Iterator[nn.Module]:
        """The teacher, ready to run."""
        if self.teacher is not None:
            yield self.teacher
            return
        with all_live(self.model), lora.disabled(self.model):
            yield self.model


def relative_error(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> Tensor:
    """Mean over regions of ``|mine - theirs|^2 / |theirs|^2``, both summed over tokens.

    A token whose ``|theirs|^2`` is above the region's median is weighed down to it: the first one
    of a sequence can be thousands of times as large as others (attention sinks), and nothing else
    would count beside it.
    """
    if not mine:
        raise BadInput(
            "the model has no routed regions to compare", help="compile it first, or mse=0"
        )
    errors = []
    for path, y in mine.items():
        wanted = theirs[path].float()
        size = wanted.square().sum(-1)
        weight = size.median() / size.maximum(size.median()).clamp_min(_TINY)
        lost = (y.float() - wanted).square().sum(-1)
        errors.append((weight * lost).sum() / (weight * size).sum().clamp_min(_TINY))
    return torch.stack(errors).mean()


def _counting(labels: Tensor | None, mask: Tensor | None, logits: Tensor) -> Tensor | None:
    """Positions whose next-token distribution counts: those before a token that does."""
    if labels is not None:
        return nn.functional.pad(labels[..., 1:] != IGNORED, (0, 1))
    if mask is not None and mask.shape == logits.shape[:-1]:
        return mask.bool()
    return None


@contextlib.contextmanager
def _taps(model: nn.Module, into: dict[str, Tensor], wanted: bool) -> Iterator[None]:
    """Inside, the result of every routed region of ``model`` is put into ``into``."""

    def keep(path: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                into[path] = output

        return hook

    found = results(model) if wanted else {}
    hooks = [module.register_forward_hook(keep(path)) for path, module in found.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
