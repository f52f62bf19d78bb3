"""LoRA for any weight of a sparse model: a low-rank change that trains, and merges exactly.

``W + scale * B @ A`` stands where ``W`` stood (Hu et al., arXiv:2106.09685), as a parametrization
of the module that owns ``W``: whoever reads the weight, graph or routed module, gets the changed
one, so it works for the packed (N, m, D) weights of experts as for plain matrices. A packed weight
is adapted as one (N*m, D) matrix: experts are rows of one matrix, ``A`` is shared by all of them
and every neuron has its own row of ``B``. ``B`` starts at zero, so nothing changes at first.

:func:`merge` puts the very tensor that was in use into the weight's place: the merged model gives
bit for bit what the adapted one gave, and no trace of the adapters stays.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparsify.errors import BadInput


class Adapter(nn.Module):
    """``W -> W + scale * (B @ A)``, W of shape (..., D).

    Args:
        scale: of the change.

    Attributes:
        enabled: whether the change is applied.
    """

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.enabled = True

    def factors(self) -> tuple[Tensor, Tensor]:
        """B (rows, r) and A (r, D)."""
        raise NotImplementedError

    def forward(self, weight: Tensor) -> Tensor:
        """The weight in use."""
        if not self.enabled:
            return weight
        b, a = self.factors()
        return weight + (b @ a).mul(self.scale).view_as(weight)


class LoRA(Adapter):
    """An adapter with factors of its own.

    Args:
        weight: what is adapted; gives shape, dtype and device.
        rank: r.
        alpha: ``scale = alpha / rank``.
        generator: of the start of ``A`` (uniform in +-1/sqrt(D), as ``nn.Linear``'s).

    Attributes:
        a: (r, D); b: (rows, r), zero at first.
    """

    def __init__(
        self, weight: Tensor, rank: int, alpha: float, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(alpha / rank)
        width = weight.shape[-1]
        a = torch.empty(rank, width, dtype=torch.float32)
        a.uniform_(-1 / math.sqrt(width), 1 / math.sqrt(width), generator=generator)
        self.a = nn.Parameter(a.to(weight))
        self.b = nn.Parameter(weight.new_zeros(weight.numel() // width, rank))

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.b, self.a

    def extra_repr(self) -> str:
        return f"rank={self.a.shape[0]}, scale={self.scale:g}"


def add(
    model: nn.Module,
    names: Sequence[str],
    *,
    rank: int = 8,
    alpha: float | None = None,
    seed: int = 0,
) -> dict[str, LoRA]:
    """Adapt the parameters ``names`` of ``model``; they are frozen, the adapters train.

    Args:
        rank: of every adapter (at most the weight's smaller side).
        alpha: default ``rank`` (scale 1).
        seed: of the adapters' start.

    Returns:
        name -> adapter.

    Raises:
        BadInput: a name is no parameter of at least two dimensions, or is adapted already.
    """
    if rank < 1:
        raise BadInput(f"rank={rank} is not a rank", help="at least 1; 8 is usual")
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, LoRA] = {}
    for name, weight in adaptable(model, names).items():
        sides = min(weight.shape[-1], weight.numel() // weight.shape[-1])
        used = min(rank, sides)
        found[name] = LoRA(weight, used, used if alpha is None else alpha * used / rank, generator)
        attach(model, name, found[name])
    return found


def adaptable(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Parameter]:
    """name -> weight; BadInput where one cannot be adapted."""
    owners: dict[int, str] = {}
    found = {}
    for name in names:
        path, _, leaf = name.rpartition(".")
        weight = model.get_submodule(path)._parameters.get(leaf)
        if weight is None or weight.dim() < 2:
            raise BadInput(f"'{name}' is no weight that LoRA can adapt")
        if id(weight) in owners:
            raise BadInput(
                f"'{name}' and '{owners[id(weight)]}' are one tied weight",
                why="an adapter would change one of them only",
                help="leave tied weights out",
            )
        owners[id(weight)] = name
        found[name] = weight
    return found


def attach(model: nn.Module, name: str, adapter: Adapter) -> None:
    """Put an adapter on a weight, which is frozen."""
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    getattr(owner, leaf).requires_grad_(False)
    parametrize.register_parametrization(owner, leaf, adapter)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """name -> parameter of the adapters; one that several share is named after the first."""
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for name, adapter in adapters(model).items():
        for leaf, parameter in adapter.named_parameters():
            found.setdefault(id(parameter), (f"{name}.{leaf}", parameter))
    return dict(found.values())


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """name of the weight -> its adapter."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, Adapter):  # <owner>.parametrizations.<leaf>.0
            owner, _, rest = f".{path}".rpartition(".parametrizations.")
            leaf = rest.rpartition(".")[0]
            found[f"{owner}.{leaf}".lstrip(".")] = module
    return found


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Inside, the model runs without its adapters."""
    mine = list(adapters(model).values())
    before = [adapter.enabled for adapter in mine]
    for adapter in mine:
        adapter.enabled = False
    try:
        yield
    finally:
        for adapter, was in zip(mine, before, strict=True):
            adapter.enabled = was


def merge(model: nn.Module) -> list[str]:
    """Put every adapted weight in use into its place and take the adapters away.

    New parameters are made: a weight that was shared with another model stays as it was there.

    Returns:
        The names of the merged weights.
    """
    names = list(adapters(model))
    for name in names:
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        with torch.no_grad():
            used = getattr(owner, leaf).detach().clone()
        _release(owner, leaf)
        owner.register_parameter(leaf, nn.Parameter(used, requires_grad=True))
    return names


def remove(model: nn.Module) -> list[str]:
    """Take the adapters away; the weights are as before :func:`add`."""
    names = list(adapters(model))
    for name in names:
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        original = owner.parametrizations[leaf].original  # type: ignore[index,union-attr]
        _release(owner, leaf)
        owner.register_parameter(leaf, original)
    return names


def _release(owner: nn.Module, leaf: str) -> None:
    """Undo ``register_parametrization`` without touching the original's storage.

    ``parametrize.remove_parametrizations`` writes the result *into* the original tensor, which
    may be another model's too.
    """
    held = owner.parametrizations
    assert isinstance(held, nn.ModuleDict)
    del held[leaf]
    if not len(held):
        del owner._modules["parametrizations"]
        owner.__class__ = type(owner).__bases__[0]
    else:
        # A class without it, of this module alone: copies of the module have the old class, too.
        kind = type(owner)
        left_out = (leaf, "__dict__", "__weakref__")
        body = {name: value for name, value in vars(kind).items() if name not in left_out}
        owner.__class__ = type(kind.__name__, kind.__bases__, body)
