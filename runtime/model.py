"""SparseModel: a captured, rewritten graph that is called like the model it came from.

Its modules, parameters and buffers are the graph's own, so state-dict names are the dense model's
for every weight that no pass touched. The graph module itself is not registered: its dicts are.
"""

from __future__ import annotations

import copy
import importlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparsify.errors import BadInput, NotCaptured, did_you_mean
from sparsify.runtime.calling import CallSpec, CausalCall
from sparsify.runtime.graph import clone, placement
from sparsify.runtime.lasttokens import LastTokens
from sparsify.runtime.precision import move
from sparsify.runtime.straight import Straight
from sparsify.runtime.trees import record

# Arguments of transformers' causal models that ask for what the graph does not compute.
_UNCAPTURED = {
    "inputs_embeds": "the graph starts from token ids",
    "output_attentions": "routed attention never forms the whole attention matrix",
    "output_hidden_states": "the graph returns logits only",
    "encoder_hidden_states": "the graph has no cross-attention inputs",
    "encoder_attention_mask": "the graph has no cross-attention inputs",
    "token_type_ids": "the graph was captured without token types",
    "head_mask": "the graph was captured without a head mask",
}
# Bookkeeping that follows from the other arguments, or changes nothing in the result.
_IGNORED = {"cache_position", "return_dict", "use_cache", "logits_to_keep", "labels"}
_SHARED_DICTS = ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set")


class SparseModel(nn.Module):
    """A sparse model: forward, training, a dial for how much is active, generation, saving.

    Args:
        graph: flat placeholders, flat tuple output (``sparsify.capture``), after any rewrites.
        call: how a caller's arguments become the graph's inputs.
        pipeline: canonical text of the passes that made it.
        report: the compile report: plain data, or an object with ``to_dict()``.
        example, golden: flat inputs and the dense model's outputs on them.
        borrowed: the parameters are also another model's; ``.to()`` then gives this model its own.
    """

    def __init__(
        self,
        graph: fx.GraphModule,
        call: CallSpec,
        *,
        pipeline: str = "",
        report: Any = None,
        example: Sequence[Tensor] = (),
        golden: Sequence[Tensor] = (),
        borrowed: bool = False,
    ) -> None:
        super().__init__()
        self.call_spec = call
        self.pipeline = pipeline
        self.report = report
        self.example = tuple(example)
        self.golden = tuple(golden)
        self.tokenizer: Any = None
        self._borrowed = borrowed
        self._last_tokens = LastTokens()
        self._straight = Straight()
        self.product: Any = None  # in place of linear(x, weight, bias); lower() puts it
        self._adopt(graph)
        self.eval()

    @classmethod
    def of(cls, captured: Any, *, tokenizer: Any = None) -> SparseModel:
        """The model of a ``sparsify.capture.Capture``, after any rewrites of its graph.

        Models from transformers get their class back with ``sparsify.hf.wrap``.
        """
        made = cls(
            captured.graph,
            captured.call,
            example=captured.example,
            golden=captured.golden,
            borrowed=captured.shared,
        )
        made.tokenizer = tokenizer
        return made

    def _adopt(self, graph: fx.GraphModule) -> None:
        # Past nn.Module.__setattr__, which would register the graph as a child, doubling all names.
        self.__dict__["_graph"] = graph
        for name in _SHARED_DICTS:
            self.__dict__[name] = graph.__dict__[name]

    # -- calling

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the dense model's forward; NotCaptured where the graph does not cover the call."""
        if isinstance(self.call_spec, CausalCall):
            return self._forward_causal(*args, **kwargs)
        flat = self.call_spec.flatten(args, kwargs)
        return self.call_spec.unflatten(self._straight.run(self.graph, flat, product=self.product))

    def _forward_causal(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Sequence[tuple[Tensor, Tensor]] | None = None,
        *,
        labels: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **others: Any,
    ) -> Any:
        """Logits, the grown cache as (key, value) pairs, and the loss where labels are given.

        The loss is a mean over the labels that count, or their sum over ``num_items_in_batch``, as
        transformers' Trainer wants it under gradient accumulation.
        """
        assert isinstance(self.call_spec, CausalCall)
        self.refuse(others)
        if input_ids is None:
            raise NotCaptured("input_ids are missing", why="the graph starts from token ids")
        if labels is not None:  # the loss needs all logits, whatever the caller keeps
            logits_to_keep = 0
        logits, cache = self.run_causal(
            input_ids, attention_mask, position_ids, past_key_values, logits_to_keep
        )
        loss = None if labels is None else next_token_loss(logits, labels, num_items_in_batch)
        keep = use_cache is not False and bool(cache)
        items = {"loss": loss, "logits": logits, "past_key_values": cache if keep else None}
        return record("", **items)

    def run_causal(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past: Sequence[tuple[Tensor, Tensor]] | None = None,
        keep: int | Tensor = 0,
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Logits (B, T, V) and the grown cache, from tensors alone.

        Args:
            keep: logits of the last ``keep`` tokens only, or of the positions a tensor names.
        """
        assert isinstance(self.call_spec, CausalCall)
        flat = self.call_spec.inputs(
            input_ids, attention_mask, position_ids, past,
            dtype=None if past else self.dtype,  # looking through all weights takes a millisecond
        )  # fmt: skip
        tokens = input_ids.shape[1]
        if isinstance(keep, int) and 0 < keep < tokens:
            return self.call_spec.unflatten(self._last_tokens.run(self.graph, flat, keep))
        found = self._straight.run(self.graph, flat, one=tokens == 1, product=self.product)
        logits, cache = self.call_spec.unflatten(found)
        return (logits[:, keep] if isinstance(keep, Tensor) else logits), cache

    def refuse(self, others: Mapping[str, Any]) -> None:
        """Raise NotCaptured for the first argument that the graph cannot honour."""
        for name, value in others.items():
            if name in _IGNORED or value is None or value is False:
                continue
            if name in _UNCAPTURED:
                raise NotCaptured(f"'{name}' is not available", why=_UNCAPTURED[name])
            known = ["input_ids", "attention_mask", "position_ids", "past_key_values", *_IGNORED]
            raise NotCaptured(
                f"the sparse model has no argument '{name}'",
                help=did_you_mean(name, known) or f"arguments: {', '.join(sorted(known))}",
            )

    def generate(self, input_ids: Tensor, **options: Any) -> Tensor:
        """Greedy or sampled continuation; see :func:`sparsify.runtime.generate.generate`."""
        from sparsify.runtime.generate import generate

        return generate(self, input_ids, **options)

    # -- the graph and the dial

    @property
    def graph(self) -> fx.GraphModule:
        """The graph that runs: the source of truth for reports, kernels and export."""
        module: fx.GraphModule = self.__dict__["_graph"]
        return module

    @property
    def kind(self) -> str:
        """``causal-lm`` or ``module``."""
        return self.call_spec.kind

    def set_active(
        self, active: float, at: str | None = None, pass_name: str | None = None
    ) -> SparseModel:
        """Set the active budget (fraction of units per token).

        Everywhere, or at matching paths (``at``, a glob), or for one pass's modules only.
        """
        from sparsify.runtime.dial import set_active

        set_active(self, active, at=at, pass_name=pass_name)
        return self

    @property
    def active(self) -> dict[str, float]:
        """Router path -> its budget."""
        from sparsify.runtime.budget import Budgeted

        routers = [(p, m) for p, m in self.named_modules() if isinstance(m, Budgeted)]
        return {path: float(m.active) for path, m in routers if not m.led}

    def realised(self) -> dict[str, float]:
        """Routed module path -> fraction of units that were live since the last reset."""
        from sparsify.runtime.counters import realised

        return realised(self)

    def reset_counters(self) -> None:
        """Start counting work anew."""
        from sparsify.runtime.counters import reset

        reset(self)

    # -- kernels

    def lower(self, *, int8: bool = False) -> Any:
        """Put kernels into the routed modules, for inference; remarks say which and why not.

        Codegen is no part of what a deployed model needs: without it, eager runs.

        Args:
            int8: read int8 copies of the weights, where a kernel can: fewer bytes, another result.
        """
        return _codegen("lower").lower(self, int8=int8)

    def export(self, path: str | os.PathLike[str], **options: Any) -> Any:
        """Write the model at its present budget as ONNX.

        Args:
            path: the file, ``model.onnx``; or a folder, one that is there or with a slash at the
                end, for ``model.onnx`` and what Optimum and onnxruntime-genai read beside it.
            options: ``target`` (``portable``: the standard's operators only; ``ort``: ONNX
                Runtime's own too; ``ort-custom``: and ours, from a library that a C compiler builds
                beside the file), ``opset``, ``external_data`` (weights in a file beside it; by
                itself above 2 GiB), ``routing`` (``mask``: dead units are set to zero; ``branch``:
                experts that no token uses are not run; ``moe``: ``ort``'s operator; ``custom``:
                ours; ``auto``: the fastest by measurement, or dense where none is faster, in calls
                of ``tokens`` tokens on ``threads`` threads of ONNX Runtime, by itself as many as
                torch has),
                ``weights`` (how matrices are stored: ``float32``, ``float16``, ``bfloat16``,
                ``int8`` or ``int4``; by itself as the model has them), ``check`` (hold the file
                against the model, in ONNX Runtime), ``force`` (replace a file), ``progress``.

        Returns:
            What was written: files, operators and parity (:mod:`sparsify.codegen.onnx.export`).

        Raises:
            NotExported, ParityFailed, OutputError, BadInput, MissingDependency.
        """
        return _codegen("onnx.export").export(self, path, **options)

    def tidied(self, tokens: int | None = None) -> dict[str, int]:
        """What inference on a CPU leaves out of the graph, and how often; results stay the same.

        Args:
            tokens: new tokens of a call; 1 (decoding) allows more.
        """
        causal = isinstance(self.call_spec, CausalCall)
        return self._straight.done(self.graph, causal and tokens == 1, self.product)

    # -- a torch module like any other

    @property
    def dtype(self) -> torch.dtype:
        """Floating dtype of most parameters."""
        return placement(self)[0] or torch.float32

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return placement(self)[1] or torch.device("cpu")

    def num_parameters(self, only_trainable: bool = False, **_: Any) -> int:
        """Number of parameters, tied ones once."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not only_trainable)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseModel:
        if self._borrowed and self._moves(fn):
            self._own_parameters()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        dtype, device = placement(self)
        move(self.graph, dtype, device, self.example)
        return self

    def _moves(self, fn: Callable[[Tensor], Tensor]) -> bool:
        """Whether ``fn`` changes dtype or device; a no-op must not replace parameters."""
        for parameter in self.parameters():
            probe = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
            moved = fn(probe)
            if moved.dtype != probe.dtype or moved.device != probe.device:
                return True
        return False

    def _own_parameters(self, *, copies: bool = False) -> None:
        """New Parameter objects over the same storage: moving them leaves the other model alone.

        Args:
            copies: over storage of their own, so that training them does too.
        """
        made: dict[int, nn.Parameter] = {}
        for module in self.modules():
            for name, parameter in module._parameters.items():
                if parameter is None:
                    continue
                if id(parameter) not in made:
                    mine = parameter.detach().clone() if copies else parameter.detach()
                    made[id(parameter)] = nn.Parameter(mine, parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]
        self._borrowed = False

    def __deepcopy__(self, memo: dict[int, Any]) -> SparseModel:
        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        graph = clone(self.graph, memo)
        for name, value in self.__dict__.items():
            if name not in (*_SHARED_DICTS, "_graph"):
                twin.__dict__[name] = copy.deepcopy(value, memo)
        twin.__dict__["_borrowed"] = False
        twin._adopt(graph)
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise BadInput(
            "a sparse model cannot be pickled",
            why="pickles run code when they are read",
            help="model.save('folder') and sparsify.load('folder'), or model.state_dict()",
        )

    def __repr__(self) -> str:
        routed = len(list(_routed(self)))
        plural = "" if routed == 1 else "s"
        return (
            f"{type(self).__name__}({self.call_spec.model}, {self.num_parameters():,} parameters, "
            f"{routed} routed module{plural}, pipeline='{self.pipeline}')"
        )

    # -- saving

    def save(self, path: str | os.PathLike[str], *, force: bool = False) -> None:
        """Write the model to a folder; OutputError where it exists (without ``force``)."""
        from sparsify.runtime.checkpoint import save_folder

        save_folder(self, path, force=force)

    def write_extras(self, folder: str) -> dict[str, Any]:
        """Hook for shells: further files for ``folder``; returns entries of the manifest."""
        return {}


def _codegen(name: str) -> Any:
    """A module of the code generator, by name: the runtime stands without it."""
    try:
        return importlib.import_module(f"sparsify.codegen.{name}")
    except ModuleNotFoundError as error:
        raise BadInput(
            "this installation has no code generator", help="pip install sparsify-fx"
        ) from error


def _routed(module: nn.Module) -> Iterator[nn.Module]:
    """Routed modules, without those inside them."""
    from sparsify.runtime.spec import RoutedModule

    for child in module.children():
        if isinstance(child, RoutedModule):
            yield child
        else:
            yield from _routed(child)


def next_token_loss(logits: Tensor, labels: Tensor, count: int | Tensor | None = None) -> Tensor:
    """Mean cross entropy of each token given the ones before; label -100 does not count.

    With ``count`` it is their sum over that number: of a larger batch that this one is a part of.
    """
    shifted = nn.functional.pad(labels, (0, 1), value=-100)[..., 1:]
    total = nn.functional.cross_entropy(
        logits.float().reshape(-1, logits.shape[-1]), shifted.reshape(-1), ignore_index=-100,
        reduction="mean" if count is None else "sum",
    )  # fmt: skip
    return total if count is None else total / count
