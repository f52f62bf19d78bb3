"""Training a routed model with other people's loops: transformers' Trainer, accelerate, PEFT.

A routed model is an ordinary module, so any loop trains it. What it wants besides the task's loss
(auxiliary losses, balancing biases, an adaptive L1 coefficient, a sparsity schedule) is one object,
:class:`Auxiliary`, with two ways in:

* any loop (accelerate's too): ``with auxiliary:`` around it, ``auxiliary.loss()`` added to the
  loss, ``before_step(n)`` and ``after_step()`` around the optimizer's step;
* ``Trainer(compute_loss_func=auxiliary.trainer_loss, callbacks=[auxiliary.trainer_callback()])``.

PEFT looks for ``nn.Linear`` modules, and the linears of a captured graph are operations on named
weights: :func:`as_modules` makes them modules (same names, same parameters) and :func:`as_weights`
turns them back before saving. Packed expert weights are adapted with PEFT's ``target_parameters``.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparsify.errors import BadInput, MissingDependency, did_you_mean
from sparsify.evaluate import logits_of
from sparsify.runtime import losses, sparsity_losses
from sparsify.runtime.checkpoint import WEIGHTS
from sparsify.runtime.model import SparseModel, next_token_loss
from sparsify.runtime.schedule import Schedule
from sparsify.runtime.sparsity_losses import Adaptive

aten = torch.ops.aten
LOSSES: dict[str, Callable[[nn.Module], Tensor]] = {
    "balance": losses.balance_loss,
    "z": losses.z_loss,
    "moh-balance": losses.moh_balance_loss,
    "null-balance": losses.null_balance_loss,
    "choice": losses.choice_loss,
    "activation": sparsity_losses.activation_loss,
}
IGNORED = -100  # the label of tokens that do not count


class Auxiliary:
    """What a routed model needs beside its task's loss while it trains.

    Args:
        model: the routed model (not a wrapper of it).
        weights: name in ``LOSSES`` -> how much that loss counts.
        l1: the coefficient of the L1 loss on the gates of ``relu`` routers, which follows the
            sparsity after every step; None = no such loss.
        correction: rate of the balancing biases after every step
            (:func:`sparsify.runtime.losses.correct`); 0 = they stay.
        schedule: turns the dial before every step; None = it stays.

    Raises:
        BadInput: an unknown loss, or a weight that is no number from 0 on.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Mapping[str, float] | None = None,
        *,
        l1: Adaptive | None = None,
        correction: float = 0.0,
        schedule: Schedule | None = None,
    ) -> None:
        self.model = model
        self.weights = dict(weights or {})
        self.l1, self.correction, self.schedule = l1, correction, schedule
        self._recording = contextlib.ExitStack()
        for name, weight in self.weights.items():
            if name not in LOSSES:
                known = did_you_mean(name, LOSSES) or f"one of: {', '.join(LOSSES)}"
                raise BadInput(f"no auxiliary loss '{name}'", help=known)
            if not 0 <= weight < float("inf"):
                raise BadInput(f"the loss '{name}' cannot count {weight:g}", help="0 or more")

    # -- in any loop

    def __enter__(self) -> Auxiliary:
        """From here on routers keep what the losses need of their latest call."""
        self._recording.enter_context(losses.recording(self.model))
        return self

    def __exit__(self, *_: object) -> None:
        self._recording.close()

    def loss(self) -> Tensor:
        """The weighted sum of the auxiliary losses of the latest forward."""
        parts = [weight * LOSSES[name](self.model) for name, weight in self.weights.items()]
        if self.l1 is not None:
            parts.append(self.l1.value * sparsity_losses.l1_loss(self.model))
        if not parts:
            return torch.zeros((), device=next(self.model.parameters()).device)
        return torch.stack(parts).sum()

    def before_step(self, step: int) -> None:
        """Turn the dial to the budget of ``step`` (the first is 0)."""
        if self.schedule is not None:
            self.schedule.apply(self.model, step)

    def after_step(self) -> None:
        """Move biases and the L1 coefficient by what the latest forward showed."""
        if self.correction:
            losses.correct(self.model, self.correction)
        if self.l1 is not None:
            self.l1.update(
                sparsity_losses.sparsity(self.model), sparsity_losses.target_sparsity(self.model)
            )

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint needs besides the model, for ``register_for_checkpointing``."""
        return {} if self.l1 is None else {"l1": self.l1.value}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Set what :meth:`state_dict` gave."""
        if self.l1 is not None and "l1" in state:
            self.l1.value = float(state["l1"])

    # -- in transformers' Trainer

    def trainer_loss(
        self, outputs: Any, labels: Tensor | None, num_items_in_batch: Any = None
    ) -> Tensor:
        """Next-token loss plus :meth:`loss`: the ``compute_loss_func`` of a Trainer.

        Under gradient accumulation every part counts by its tokens, auxiliary losses too.
        """
        if labels is None:
            raise BadInput("the batch has no labels", help="labels = input_ids for language models")
        task = next_token_loss(logits_of(outputs), labels, num_items_in_batch)
        if not self.model.training:
            return task
        counted = (labels[..., 1:] != IGNORED).sum()
        share = 1.0 if num_items_in_batch is None else counted / num_items_in_batch
        return task + share * self.loss()

    def trainer_callback(self) -> Any:
        """A ``TrainerCallback`` that records, turns the dial and moves what adapts.

        It also lets ``trainer.train(resume_from_checkpoint=...)`` find the weights of a sparse
        model, and saves the L1 coefficient in ``trainer_state.json``.
        """
        try:
            from transformers import TrainerCallback
            from transformers.trainer_callback import ExportableState
        except ImportError as error:
            raise MissingDependency(
                "transformers is not installed", help="pip install sparsify-fx[train]"
            ) from error
        mine = self

        class AuxiliaryCallback(TrainerCallback, ExportableState):
            """Made anew by Trainer on resuming, without arguments: it finds ``mine`` here."""

            held: Any = None  # where Trainer itself restores it, which is off by default

            def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                saved = state.stateful_callbacks.get(type(self).__name__, {})
                if state.global_step and isinstance(saved, dict):  # resumed
                    mine.load_state_dict(saved["attributes"]["held"])
                mine.__enter__()

            def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                mine.__exit__()

            def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                mine.before_step(state.global_step)

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                mine.after_step()

            def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if state.is_world_process_zero:
                    _findable(Path(args.output_dir) / f"checkpoint-{state.global_step}")

            def state(self) -> dict[str, Any]:
                return {"args": {}, "attributes": {"held": mine.state_dict()}}

        return AuxiliaryCallback()


def _findable(folder: Path) -> None:
    """Give the weights of a saved sparse model also the name under which Trainer looks for them."""
    ours, theirs = folder / WEIGHTS, folder / "model.safetensors"
    if ours.exists() and not theirs.exists():
        try:
            os.link(ours, theirs)
        except OSError:  # a file system without links
            shutil.copyfile(ours, theirs)


# ---------------------------------------------------------------------------- for PEFT


def as_modules(model: SparseModel) -> list[str]:
    """Make the linears of the graph ``nn.Linear`` modules at the paths of their weights.

    Names and parameters stay; only what calls them changes. Routed modules are left alone. Linears
    whose weight something else reads too (by that name) stay as they are.

    Returns:
        Their paths, for PEFT's ``target_modules``.
    """
    graph = model.graph.graph
    found: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        path = _linear_path(model, node)
        if path is not None:
            found.setdefault(path, []).append(node)
    for path, nodes in found.items():
        owner = model.get_submodule(path)
        weight, bias = owner.weight, owner._parameters.get("bias")
        assert isinstance(weight, nn.Parameter)
        made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
        made.weight, made.bias = weight, bias  # type: ignore[assignment]
        _put(model, path, made.train(owner.training))
        for node in nodes:
            with graph.inserting_before(node):
                called = graph.call_module(path, (node.args[0],))
            _replace(graph, node, called)
    model.graph.recompile()
    return list(found)


def as_weights(model: SparseModel) -> list[str]:
    """Undo :func:`as_modules`: a model can be saved, compiled and exported again.

    Returns:
        The paths of the linears.

    Raises:
        BadInput: adapters are still on them.
    """
    graph = model.graph.graph
    found = []
    for node in [n for n in graph.nodes if n.op == "call_module"]:
        path = str(node.target)
        linear = model.get_submodule(path)
        if hasattr(linear, "base_layer"):
            raise BadInput(
                f"an adapter is on {path}", help="merge it first: peft_model.merge_and_unload()"
            )
        if type(linear) is nn.Linear:
            with graph.inserting_before(node):
                read = [graph.get_attr(f"{path}.{leaf}") for leaf, p in _own(linear)]
                called = graph.call_function(aten.linear.default, (node.args[0], *read))
            _replace(graph, node, called)
            found.append(path)
    for path in dict.fromkeys(found):
        linear, holder = model.get_submodule(path), nn.Module()
        for leaf, parameter in _own(linear):
            holder.register_parameter(leaf, parameter)
        _put(model, path, holder.train(linear.training))
    model.graph.recompile()
    return list(dict.fromkeys(found))


def _own(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(leaf, p) for leaf, p in module._parameters.items() if p is not None]


def _linear_path(model: SparseModel, node: fx.Node) -> str | None:
    """The path of the weights of a linear that could be a module; None for all other nodes."""
    if node.op != "call_function" or node.target is not aten.linear.default or node.kwargs:
        return None
    _, *reads = (arg for arg in node.args if arg is not None)
    names = []
    for read in reads:
        if not isinstance(read, fx.Node) or read.op != "get_attr":
            return None
        if any(user.target is not aten.linear.default for user in read.users):
            return None
        names.append(str(read.target))
    path = names[0].rpartition(".")[0]
    if names not in ([f"{path}.weight"], [f"{path}.weight", f"{path}.bias"]) or not path:
        return None
    owner = model.get_submodule(path)
    leaves = [leaf for leaf, _ in _own(owner)]
    plain = type(owner) is nn.Module and not owner._modules and not owner._buffers
    return path if plain and len(leaves) == len(names) else None


def _put(model: SparseModel, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    model.get_submodule(parent)._modules[leaf] = module


def _replace(graph: fx.Graph, node: fx.Node, new: fx.Node) -> None:
    """Put ``new`` into the place of ``node``; reads of weights that nobody uses go too."""
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    reads = [n for n in node.all_input_nodes if n.op == "get_attr"]
    graph.erase_node(node)
    for read in reads:
        if not read.users:
            graph.erase_node(read)
