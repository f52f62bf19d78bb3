"""What healing trains, and its checkpoints: safetensors and JSON, written whole or not at all.

A checkpoint is a folder ``step-00040`` with ``tensors.safetensors`` (trained weights, the best so
far, both moments of AdamW, threshold shifts, torch's random state) and ``state.json`` (step,
curves, plan, digest). It is written under a temporary name and renamed, and only then is the one
before removed: whenever the process dies, the newest folder of that name is complete. The order of
the text follows from seed and step, so a resumed run does what the straight run would have done.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from sparsify.errors import BadCheckpoint, BadInput
from sparsify.runtime import lora, shards
from sparsify.runtime.budget import TABLES, Budgeted
from sparsify.runtime.files import new_folder, read_json, sha256, write_json
from sparsify.runtime.gated import GatedLinear
from sparsify.runtime.inputs import RoutedLinear
from sparsify.runtime.model import SparseModel
from sparsify.runtime.spec import RoutedModule

if TYPE_CHECKING:
    from sparsify.runtime.training import Thresholds

Train = Literal["routers", "lora", "routed", "all"]
TRAIN: tuple[Train, ...] = get_args(Train)
WHOLE = ("routed", "all")  # the weights themselves train: the dense teacher is a copy
STATE, TENSORS, FORMAT = "state.json", "tensors.safetensors", 1
STAND_INS = ("dropped", "slopes", "vectors")  # of routed modules, for dead units
_NAMED = re.compile(r"step-(\d{5,})")


# ---------------------------------------------------------------------------- what trains


@dataclasses.dataclass
class Trainee:
    """The parameters of a model that train, and how to put everything back.

    Attributes:
        groups: kind -> name -> parameter: ``routers`` (weights, biases), ``stand-ins`` (what is
            added for dead units), ``centres`` (what dead inputs of projections are replaced by),
            ``lora`` (adapters), ``routed`` (weights of the routed modules, where only those
            train), ``weights`` (all others).
    """

    model: SparseModel
    train: Train
    groups: dict[str, dict[str, Tensor]]
    _flags: list[tuple[nn.Parameter, bool]]
    _tied: list[RoutedLinear]
    _start: dict[str, Tensor]

    @classmethod
    def of(
        cls, model: SparseModel, train: Train, *, rank: int, seed: int, pieces: int = 0
    ) -> Trainee:
        """Choose what trains, freeze the rest, put adapters on (``pieces``: shards of a vector).

        Raises:
            BadInput: there is nothing to train.
        """
        flags = [(p, p.requires_grad) for p in model.parameters()]
        if train in WHOLE:
            if model._borrowed:
                model._own_parameters(copies=True)
            flags = [(p, p.requires_grad) for p in model.parameters()]
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        groups: dict[str, dict[str, Tensor]] = {"routers": {}, "stand-ins": {}, "centres": {}}
        packed, inside, tied = [], {}, []
        for path, module in model.named_modules():
            if isinstance(module, RoutedLinear) and module.offset is not None:
                tied.append(module)
                groups["centres"][f"{path}.select.centre"] = module.select.get_buffer("centre")
            if isinstance(module, GatedLinear):
                groups["centres"][f"{path}.usual"] = module.usual
            for leaf, parameter in module._parameters.items():
                if parameter is None or not parameter.is_floating_point():
                    continue
                name = f"{path}.{leaf}"
                if isinstance(module, Budgeted):
                    groups["routers"][name] = parameter
                elif isinstance(module, RoutedModule) and leaf in STAND_INS:
                    groups["stand-ins"][name] = parameter
                elif isinstance(module, RoutedModule) and not _is_tied(module, leaf):
                    inside[name] = parameter
                    if parameter.dim() >= 2:
                        packed.append(name)
        if train == "lora":
            shards.add_adapters(model, packed, rank=rank, count=pieces, seed=seed)
            groups["lora"] = dict(lora.trained(model))
        if train == "routed":
            groups["routed"] = inside
        if train == "all":
            known = {id(p) for group in groups.values() for p in group.values()}
            known |= {id(module.offset) for module in tied}
            rest = {n: p for n, p in model.named_parameters() if id(p) not in known}
            groups["weights"] = {n: p for n, p in rest.items() if p.is_floating_point()}
        groups = {kind: group for kind, group in groups.items() if group}
        if not groups:
            raise BadInput(
                "there is nothing to heal: the model has no routed modules",
                help="sparsify compile MODEL -p ffn-moe -o OUT",
            )
        for group in groups.values():
            for trains in group.values():
                trains.requires_grad_(True)
        start = {n: p.detach().clone() for g in groups.values() for n, p in g.items()}
        start |= {n: t.clone() for n, t in tables(model).items()}
        start |= {name: offset.clone() for name, offset in _offsets(tied)}
        return cls(model, train, groups, flags, tied, start)

    @property
    def parameters(self) -> dict[str, Tensor]:
        """name -> parameter, of all groups."""
        return {name: p for group in self.groups.values() for name, p in group.items()}

    @property
    def count(self) -> int:
        """Numbers that train."""
        return sum(p.numel() for p in self.parameters.values())

    def values(self) -> dict[str, Tensor]:
        """Copies of what trains."""
        return {name: p.detach().clone() for name, p in self.parameters.items()}

    def put(self, values: dict[str, Tensor]) -> None:
        """Set what trains to ``values``."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(values[name])
        for module in self._tied:
            module.retie()

    def undo(self) -> None:
        """The model as it was before: weights, tables, no adapters."""
        self.put(self._start)
        with torch.no_grad():
            for name, offset in _offsets(self._tied):  # bit for bit, on whatever machine
                offset.copy_(self._start[name])
        put_tables(self.model, self._start)
        lora.remove(self.model)

    def finish(self) -> None:
        """Merge adapters into the weights."""
        lora.merge(self.model)

    def unfreeze(self) -> None:
        """Let train what trained before."""
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)
        for centre in self.groups.get("centres", {}).values():  # a buffer
            centre.requires_grad_(False)


def _offsets(tied: list[RoutedLinear]) -> Iterator[tuple[str, Tensor]]:
    for number, module in enumerate(tied):
        if module.offset is not None:
            yield f"{number}.offset", module.offset.detach()


def _is_tied(module: nn.Module, leaf: str) -> bool:
    """Whether a parameter follows from others: a projection's offset, from centre and columns."""
    return isinstance(module, RoutedLinear) and leaf == "offset"


def tables(model: nn.Module) -> dict[str, Tensor]:
    """name -> table of every budgeted module (scores, settled thresholds)."""
    return {f"{path}.{name}": table for path, name, table in _tables(model) if table is not None}


def put_tables(model: nn.Module, values: dict[str, Tensor]) -> None:
    """Set every table to what ``values`` holds under its name; None where it holds nothing."""
    for path, module in list(model.named_modules()):
        if isinstance(module, Budgeted):
            for name in TABLES:
                found = values.get(f"{path}.{name}")
                setattr(module, name, None if found is None else found.clone())
            module.setting = module.setting  # forgets the threshold that it has read


def _tables(model: nn.Module) -> Iterator[tuple[str, str, Tensor | None]]:
    for path, module in model.named_modules():
        if isinstance(module, Budgeted):
            for name in TABLES:
                yield path, name, getattr(module, name)


# ---------------------------------------------------------------------------- checkpoints


@dataclasses.dataclass
class Progressed:
    """How far a healing is.

    Attributes:
        step: steps done.
        seconds, cpu_seconds: spent so far, over all its processes.
        steps: a row per step; evaluations: a row per evaluation.
        best: values of the best step so far and its threshold shifts.
        best_step: 0 where nothing was better than the start.
    """

    step: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    steps: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    evaluations: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    best: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    best_shifts: Tensor = dataclasses.field(default_factory=lambda: torch.zeros(0))
    best_step: int = 0


def write(
    folder: Path,
    plan: dict[str, Any],
    done: Progressed,
    trainee: Trainee,
    optimizer: torch.optim.Optimizer,
    thresholds: Thresholds,
) -> None:
    """A checkpoint into ``folder/step-N``, then away with older ones."""
    from safetensors.torch import save_file

    tensors = {f"now.{n}": p.detach() for n, p in trainee.parameters.items()}
    for name, parameter in trainee.parameters.items():
        for key in ("exp_avg", "exp_avg_sq", "step"):
            if key in optimizer.state.get(parameter, {}):
                tensors[f"{key}.{name}"] = optimizer.state[parameter][key]
    tensors |= {f"best.{n}": t for n, t in done.best.items()}
    tensors |= {"shifts": thresholds.shifts, "best_shifts": done.best_shifts}
    tensors["random"] = torch.get_rng_state()
    rows = {k: v for k, v in vars(done).items() if not isinstance(v, dict | Tensor)}
    with new_folder(folder / f"step-{done.step:05d}", marker=STATE, force=True) as fresh:
        save_file({n: t.contiguous() for n, t in tensors.items()}, str(fresh / TENSORS))
        state = {"format": FORMAT, "plan": plan, "sha256": sha256(fresh / TENSORS), **rows}
        write_json(fresh / STATE, state)
    for number, old in _checkpoints(folder):
        if number != done.step:
            shutil.rmtree(old, ignore_errors=True)
    for stray in folder.glob(".step-*.tmp"):  # of a process that was killed while writing
        shutil.rmtree(stray, ignore_errors=True)


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of the complete checkpoints, ascending."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        named = _NAMED.fullmatch(path.name)
        if named and (path / STATE).is_file():
            found.append((int(named[1]), path))
    return sorted(found)


def exists(folder: Path) -> bool:
    """Whether there is a checkpoint to resume from."""
    return bool(_checkpoints(folder))


def read(
    folder: Path,
    plan: dict[str, Any],
    trainee: Trainee,
    optimizer: torch.optim.Optimizer,
    thresholds: Thresholds,
) -> Progressed:
    """Put the newest checkpoint back into model, optimizer and thresholds.

    Raises:
        BadCheckpoint: it is damaged, or of another model, text or plan (says of what).
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    _, path = _checkpoints(folder)[-1]
    state = read_json(path / STATE)
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise BadCheckpoint(f"{path} is no checkpoint of this sparsify", help="start anew")
    differs = [k for k in plan if plan[k] != state["plan"].get(k)]
    if differs:
        was = ", ".join(f"{k}={state['plan'].get(k)!r} (now {plan[k]!r})" for k in differs)
        raise BadCheckpoint(
            f"{folder} belongs to another healing", why=f"there {was}",
            help="resume with the same options, or start anew",
        )  # fmt: skip
    try:
        if sha256(path / TENSORS) != state["sha256"]:
            raise BadCheckpoint(f"{path / TENSORS} is damaged", help="start anew")
        tensors = load_file(str(path / TENSORS))
        trainee.put({n: tensors[f"now.{n}"] for n in trainee.parameters})
        for name, parameter in trainee.parameters.items():
            if f"step.{name}" in tensors:
                optimizer.state[parameter] = {
                    key: tensors[f"{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")
                }
        thresholds.shifts.copy_(tensors["shifts"])
        torch.set_rng_state(tensors["random"])
        best = {n.removeprefix("best."): t for n, t in tensors.items() if n.startswith("best.")}
        rows = {f.name: state[f.name] for f in dataclasses.fields(Progressed) if f.name in state}
        return Progressed(**rows, best=best, best_shifts=tensors["best_shifts"])
    except (KeyError, TypeError, RuntimeError, OSError, SafetensorError) as error:
        raise BadCheckpoint(
            f"{path} cannot be read", why=f"{type(error).__name__}: {error}", help="start anew"
        ) from error
