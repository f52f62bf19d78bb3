"""How neurons are grouped into experts, and what an expert is worth for a token.

Shapes: T calibration tokens, D width, F neurons, N experts of m = F / N neurons.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from sparsify.core import Refused
from sparsify.regions import FeedForward

KMEANS_TOKENS = 2048  # more tokens did not change the clusters' quality, and time grows with them


def hidden_of(ffn: FeedForward, x: Tensor) -> Tensor:
    """(T, D) -> (T, F): the dense layer's hidden activations."""
    up = functional.linear(x, ffn.up.weight, ffn.up.bias)
    if ffn.gate is None:
        return ffn.activation(up)
    return ffn.activation(up, functional.linear(x, ffn.gate.weight, ffn.gate.bias))


def default_experts(neurons: int, most: int) -> int:
    """The largest count up to ``most`` that divides the neurons into blocks of at least eight."""
    fitting = [n for n in range(2, most + 1) if neurons % n == 0 and neurons // n >= 8]
    return max(fitting, default=1)


def check_experts(hidden: int, experts: int, shared: int) -> None:
    """Refused where ``hidden`` neurons do not make ``experts``, ``shared`` of them shared."""
    if experts < 2:
        raise Refused(f"{hidden} hidden neurons are too few or do not divide into experts")
    if hidden % experts:
        near = divisors_near(hidden, experts)
        raise Refused(
            f"{hidden} hidden neurons do not divide into {experts} experts",
            suggestion=f"experts={near[0]} ({hidden} = {near[0]} x {hidden // near[0]})"
            if near
            else None,
        )
    if shared >= experts:
        raise Refused(
            f"{shared} shared of {experts} experts leave none to route",
            suggestion=f"shared={experts // 4}",
        )


def divisors_near(neurons: int, experts: int) -> list[int]:
    """The counts that divide ``neurons``, nearest to ``experts`` first."""
    fitting = [n for n in range(2, min(neurons, 512) + 1) if neurons % n == 0]
    return sorted(fitting, key=lambda n: (abs(math.log(n / experts)), n))


def neuron_energy(ffn: FeedForward, hidden: Tensor | None) -> Tensor:
    """(F,): variance of what each neuron adds to the output, ``Var[h] * |w_down|^2``.

    The mean can be compensated by a bias, so only the variance counts. Without samples, the product
    of the norms of a neuron's rows and column.
    """
    down = ffn.down.weight.float().square().sum(0)
    if hidden is not None:
        return hidden.float().var(0) * down
    up = ffn.up.weight.float().square().sum(1)
    gate = ffn.gate.weight.float().square().sum(1) if ffn.gate is not None else 1.0
    return up * gate * down


def group(
    ffn: FeedForward, hidden: Tensor | None, experts: int, shared: int, split: str, seed: int
) -> Tensor:
    """Order of neurons, so that expert e is ``order[e*m:(e+1)*m]``; the shared ones come first.

    Args:
        hidden: (T, F) activations of calibration tokens, or None.
        split: ``contiguous`` (as stored), ``importance`` (sorted by energy) or ``cluster``
            (balanced k-means on where a neuron is active; on the weights without samples).
    """
    neurons = ffn.hidden
    block = neurons // experts
    energy = neuron_energy(ffn, hidden)
    if split == "contiguous" and not shared:
        return torch.arange(neurons)
    ranked = energy.argsort(descending=True, stable=True)
    always, rest = ranked[: shared * block].sort().values, ranked[shared * block :]
    if split == "importance":
        return torch.cat([always, rest])
    rest = rest.sort().values
    if split == "contiguous" or experts - shared < 2:
        return torch.cat([always, rest])
    rounds = 8 if hidden is not None else 3  # weights say little: no reason to spend time on them
    owner = balanced_kmeans(
        _fingerprints(ffn, hidden)[rest], experts - shared, iterations=rounds, seed=seed
    )
    return torch.cat([always, rest[owner.argsort(stable=True)]])


def _fingerprints(ffn: FeedForward, hidden: Tensor | None) -> Tensor:
    """(F, n): neurons with similar rows are live for the same tokens."""
    if hidden is None:
        part = ffn.gate if ffn.gate is not None else ffn.up
        return part.weight.float()
    step = max(1, len(hidden) // KMEANS_TOKENS)
    norm: Tensor = ffn.down.weight.float().norm(dim=0)
    return (hidden[::step].float() * norm).abs().T.contiguous()


def balanced_kmeans(vectors: Tensor, k: int, *, iterations: int = 8, seed: int = 0) -> Tensor:
    """Spherical k-means with clusters of equal size.

    Args:
        vectors: (n, d); k divides n.

    Returns:
        int64 (n,): the cluster of each row.
    """
    unit = functional.normalize(vectors, dim=1)
    generator = torch.Generator().manual_seed(seed)
    chosen = [int(torch.randint(len(unit), (1,), generator=generator))]
    nearest = unit @ unit[chosen[0]]
    for _ in range(k - 1):  # k-means++ seeding
        far = (1 - nearest).clamp_min(1e-6)
        chosen.append(int(torch.multinomial(far, 1, generator=generator)))
        nearest = torch.maximum(nearest, unit @ unit[chosen[-1]])
    centres = unit[chosen]
    owner = torch.zeros(len(unit), dtype=torch.long)
    for _ in range(iterations):
        before = owner
        owner = _assign(unit @ centres.T, len(unit) // k)
        if torch.equal(owner, before):
            break
        sums = torch.zeros_like(centres).index_add_(0, owner, unit)
        centres = functional.normalize(sums, dim=1)
    return owner


def _assign(similarity: Tensor, capacity: int) -> Tensor:
    """Each row to one column, ``capacity`` rows a column, by rounds of proposals.

    Among those that propose to a full column, the rows that lose most by going elsewhere stay. (An
    exact assignment costs O(n^3): too slow for every k-means round of every layer.)
    """
    rows, columns = similarity.shape
    owner = torch.full((rows,), -1, dtype=torch.long)
    free = torch.full((columns,), capacity, dtype=torch.long)
    while bool((owner < 0).any()):
        waiting = (owner < 0).nonzero().flatten()
        offers = similarity[waiting].masked_fill(free == 0, -torch.inf)
        best, wanted = offers.max(1)
        loss = best - offers.scatter(1, wanted[:, None], -torch.inf).max(1).values
        order = loss.argsort(descending=True, stable=True)
        order = order[wanted[order].argsort(stable=True)]
        column = wanted[order]
        first = torch.searchsorted(column, torch.arange(columns))
        taken = order[torch.arange(len(order)) - first[column] < free[column]]
        owner[waiting[taken]] = wanted[taken]
        free -= torch.bincount(wanted[taken], minlength=columns)
    return owner


def expert_energy(ffn: FeedForward, hidden: Tensor, order: Tensor, experts: int) -> Tensor:
    """(T, N): squared norm of what a token loses if an expert is replaced by its mean output.

    Through the Gram matrix of each block's down columns, so no (T, N, D) tensor is made.
    """
    block = len(order) // experts
    centred = (hidden - hidden.mean(0))[:, order].float().view(len(hidden), experts, block)
    columns = ffn.down.weight.float().T[order].view(experts, block, -1)
    gram = columns @ columns.transpose(1, 2)
    parts = centred.transpose(0, 1)
    return ((parts @ gram) * parts).sum(-1).T.contiguous()


def mean_outputs(ffn: FeedForward, hidden: Tensor, order: Tensor, experts: int) -> Tensor:
    """(N, D): each expert's mean output over the calibration tokens."""
    mean = hidden.float().mean(0)[order].view(experts, -1, 1)
    columns = ffn.down.weight.float().T[order].view(experts, mean.shape[1], -1)
    return (mean * columns).sum(1)
