"""Saved sparse models: a folder of JSON and safetensors, no pickle anywhere.

``sparsify.json`` holds the graph, the call, the specs of routed modules, the pipeline and digests;
``sparsify.safetensors`` the weights, tied ones once; ``golden.safetensors`` example inputs and the
dense model's outputs; ``report.json`` the compile report. Loading needs torch and safetensors only.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.errors import BadCheckpoint, BadInput, OutputError
from sparsify.runtime.calling import call_from_json
from sparsify.runtime.files import new_folder, read_json, sha256, write_json
from sparsify.runtime.graph import attach, graph_from_json, graph_to_json
from sparsify.runtime.model import SparseModel
from sparsify.runtime.spec import from_spec, is_routed

FORMAT = 1
MANIFEST = "sparsify.json"
WEIGHTS = "sparsify.safetensors"
GOLDEN = "golden.safetensors"
REPORT = "report.json"


# ---------------------------------------------------------------------------- saving


def save_folder(model: SparseModel, path: str | os.PathLike[str], *, force: bool = False) -> None:
    """Write ``model`` to the folder ``path``, whole or not at all.

    Raises:
        OutputError: the folder exists (without ``force``) or cannot be written.
        BadInput: the model holds something that cannot be stored without pickle.
    """
    with new_folder(path, marker=MANIFEST, force=force) as folder:
        manifest = _manifest(model)
        tensors, manifest["tensors"] = _tensors(model)
        _save_tensors(tensors, folder / WEIGHTS)
        golden = {f"example.{i}": t for i, t in enumerate(model.example)}
        golden |= {f"golden.{i}": t for i, t in enumerate(model.golden)}
        _save_tensors(golden, folder / GOLDEN)
        manifest["files"] = {name: sha256(folder / name) for name in (WEIGHTS, GOLDEN)}
        report = model.report
        write_json(folder / REPORT, report.to_dict() if hasattr(report, "to_dict") else report)
        manifest["extras"] = model.write_extras(str(folder))
        write_json(folder / MANIFEST, manifest)


def _manifest(model: SparseModel) -> dict[str, Any]:
    modules = {}
    for path, module in _outermost_routed(model):
        modules[path] = module.spec()
    for node in model.graph.graph.nodes:
        if node.op == "call_module" and node.target not in modules:
            raise BadInput(
                f"the module at '{node.target}' cannot be saved",
                why=f"{type(model.get_submodule(node.target)).__name__} is no routed module",
                help="register its class with sparsify.runtime.spec.routed",
            )
    return {
        "format": FORMAT,
        "torch": torch.__version__,
        "pipeline": model.pipeline,
        "call": model.call_spec.to_json(),
        "graph": graph_to_json(model.graph),
        "modules": modules,
        "active": model.active,
    }


def _outermost_routed(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Routed modules that lie in no other routed module (inner ones are in their spec)."""
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if is_routed(child):
            yield path, child
        else:
            yield from _outermost_routed(child, f"{path}.")


def _tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors to store (each object once), and for every name what it is."""
    stored: dict[str, Tensor] = {}
    entries: dict[str, Any] = {}
    first_name: dict[int, str] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for kind, held in (("parameter", module._parameters), ("buffer", module._buffers)):
            for leaf, tensor in held.items():
                if tensor is None:
                    continue
                name = f"{prefix}.{leaf}" if prefix else leaf
                entry: dict[str, Any] = {"kind": kind}
                if tensor.requires_grad:
                    entry["trained"] = True
                if leaf in module._non_persistent_buffers_set:
                    entry["persistent"] = False
                if id(tensor) in first_name:
                    entry["tied_to"] = first_name[id(tensor)]
                else:
                    first_name[id(tensor)] = name
                    stored[name] = tensor
                entries[name] = entry
    return stored, entries


def _save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    seen: set[int] = set()
    ready: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().contiguous()
        storage = plain.untyped_storage().data_ptr()
        if storage in seen and plain.numel():  # views of one storage: the format wants them apart
            plain = plain.clone()
        seen.add(storage)
        ready[name] = plain
    try:
        save_file(ready, str(path))
    except SafetensorError as error:
        raise OutputError(f"cannot write {path.name}", why=str(error)) from error


# ---------------------------------------------------------------------------- loading


def load_folder(path: str | os.PathLike[str]) -> SparseModel:
    """The sparse model saved in ``path``.

    Raises:
        BadCheckpoint: files are missing or damaged, or the format or a module is unknown.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise BadCheckpoint(f"no folder {folder}", help="name a folder written by model.save")
    if not (folder / MANIFEST).exists():
        raise BadCheckpoint(
            f"{folder} holds no {MANIFEST}", help="name a folder written by model.save"
        )
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or "format" not in manifest:
        raise BadCheckpoint(f"{folder / MANIFEST} is not a sparse model's manifest")
    if manifest["format"] != FORMAT:
        raise BadCheckpoint(
            f"{folder} has format {manifest['format']}, this sparsify reads {FORMAT}",
            help="update sparsify-fx, or compile the model again",
        )
    try:
        return _load(folder, manifest)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadCheckpoint(
            f"{folder / MANIFEST} is damaged", why=f"{type(error).__name__}: {error}"
        ) from error


def _load(folder: Path, manifest: dict[str, Any]) -> SparseModel:
    for name, digest in manifest["files"].items():
        if name not in (WEIGHTS, GOLDEN):
            raise BadCheckpoint(f"{MANIFEST} names an unknown file {name!r}")
        if not (folder / name).is_file():
            raise BadCheckpoint(f"{folder / name} is missing", help="copy or save the model again")
        if sha256(folder / name) != digest:
            raise BadCheckpoint(
                f"{folder / name} is not the file that was saved",
                why="its SHA-256 differs: it was cut short, damaged or exchanged",
                help="copy or save the model again",
            )
    root = nn.Module()
    for path, spec in manifest["modules"].items():
        attach(root, path, from_spec(spec))
    _fill(root, _read_tensors(folder / WEIGHTS), manifest["tensors"])
    graph = graph_from_json(manifest["graph"], root)
    golden = _read_tensors(folder / GOLDEN)
    _check_names(graph, manifest["graph"])
    return SparseModel(
        graph,
        call_from_json(manifest["call"]),
        pipeline=str(manifest["pipeline"]),
        report=read_json(folder / REPORT),
        example=_numbered(golden, "example"),
        golden=_numbered(golden, "golden"),
    )


def _read_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(str(path))
    except (SafetensorError, OSError, ValueError) as error:
        raise BadCheckpoint(f"{path} is not readable", why=str(error)) from error


def _numbered(tensors: Mapping[str, Tensor], stem: str) -> tuple[Tensor, ...]:
    count = sum(name.startswith(f"{stem}.") for name in tensors)
    return tuple(tensors[f"{stem}.{index}"] for index in range(count))


def _fill(root: nn.Module, tensors: Mapping[str, Tensor], entries: Mapping[str, Any]) -> None:
    """Put every tensor at its name; routed modules must get all that they hold, in their shapes."""
    expected = {name: None if tensor is None else tensor.shape for name, tensor in _held(root)}
    made: dict[str, Tensor] = {}
    for name, entry in entries.items():
        source = entry.get("tied_to")
        if source is not None:
            tensor = made[source]
        elif name not in tensors:
            raise BadCheckpoint(f"the weight '{name}' is missing from {WEIGHTS}")
        elif entry["kind"] == "parameter":
            trained = bool(entry.get("trained", False))
            tensor = nn.Parameter(tensors[name], requires_grad=trained)
        else:
            tensor = tensors[name]
        shape = expected.get(name)
        if shape is not None and tensor.shape != shape:
            raise BadCheckpoint(
                f"the weight '{name}' has shape {tuple(tensor.shape)}, needed is {tuple(shape)}"
            )
        made[name] = tensor
        attach(root, name, tensor, bool(entry.get("persistent", True)))
    for name, shape in expected.items():
        if shape is not None and name not in made:
            raise BadCheckpoint(f"the weight '{name}' is missing from {WEIGHTS}")


def _held(root: nn.Module) -> Iterator[tuple[str, Tensor | None]]:
    for prefix, module in root.named_modules():
        for held in (module._parameters, module._buffers):
            for leaf, tensor in held.items():
                yield (f"{prefix}.{leaf}" if prefix else leaf), tensor


def _check_names(graph: nn.Module, data: Mapping[str, Any]) -> None:
    """Every weight and module that the graph reads is there."""
    for node in data["nodes"]:
        if node["op"] not in ("get_attr", "call_module"):
            continue
        owner, _, leaf = str(node["target"]).rpartition(".")
        try:
            found = getattr(graph.get_submodule(owner), leaf)
        except AttributeError:
            found = None
        module = node["op"] == "call_module"
        if found is None or (module and not is_routed(found)):
            raise BadCheckpoint(f"the graph reads '{node['target']}', which is missing")
