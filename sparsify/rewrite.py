"""Splice routed modules over a region's sites, keep provenance, drop what nothing reads."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Iterable, Mapping
from typing import Any

from torch import fx, nn

from sparsify.core import Moved, Rewrite
from sparsify.errors import SparsifyBug
from sparsify.probe import attribute, op_base
from sparsify.regions import Host, Region
from sparsify.runtime.spec import RoutedModule


def splice(
    gm: fx.GraphModule, region: Region, rewrite: Rewrite, pass_name: str, regions: list[Region]
) -> dict[str, str]:
    """Put a rewrite's modules into the graph and update every region's nodes.

    Returns:
        where modules were meant to live -> where they live, where the model's own names stood in
        the way; weight maps follow it (see :func:`renamed`).

    Args:
        gm: the graph; changed in place.
        region: the region rewritten; its ports and sites afterwards name the new nodes.
        rewrite: what the pass returned.
        pass_name: stamped on the new nodes.
        regions: all regions of the graph (their ports may name replaced nodes).
    """
    handles: dict[str, fx.Node] = dict(region.ports)
    sites = dict(region.sites)
    for inner in region.parts:  # a pass on the larger region may replace its projections too
        handles.setdefault(f"{inner.role}.x", inner.ports["x"])
        sites.setdefault(inner.role, inner.sites["projection"])
    replaced: dict[fx.Node, fx.Node] = {}
    names: dict[str, str] = {}
    path = region.path.split("#")[0]
    for part in rewrite.splices:
        missing = [name for name in part.inputs if name not in handles]
        if missing or (part.site is not None and part.site not in sites):
            raise SparsifyBug(
                f"{pass_name} names {missing or part.site!r}, which {region.kind} does not have",
                where=f"{region.path}: ports {sorted(region.ports)}, sites {sorted(sites)}",
                help="see sparsify/regions.py for the ports and sites of each region",
            )
        wanted = f"{path}.{part.name}" if path else part.name
        target = _free_name(gm, wanted)
        if target != wanted:
            names[wanted] = target
        gm.add_submodule(target, part.module)
        region.made[part.name] = part.module
        inputs = [replaced.get(handles[name], handles[name]) for name in part.inputs]
        old = sites[part.site].result if part.site is not None else None
        at = old if old is not None else max(inputs, key=_order)
        place = gm.graph.inserting_before(at) if old is not None else gm.graph.inserting_after(at)
        with place:
            node = gm.graph.call_module(target, tuple(inputs))
        model = old if old is not None else region.ports["x"]
        node.meta.update({k: v for k, v in model.meta.items() if k not in ("keep", "from_node")})
        node.meta["sparsify"] = {"pass": pass_name, "region": region.path}
        if old is not None:
            old.replace_all_uses_with(node, delete_user_cb=functools.partial(operator.is_not, node))
            replaced[old] = node
            extra = sites[str(part.site)].extra
            if extra:  # the module returns a tuple
                replaced |= _take_apart(gm, node, (old, *extra))
                node = replaced[old]
        else:
            node.meta.pop("shape", None)
            if part.inputs == ("x",):
                for other in regions:  # that read the same x: one router can serve them all
                    if other is not region and other.ports.get("x") is inputs[0]:
                        other.ports[f"{pass_name}.{part.name}"] = node
        handles[part.name] = node
    used = [sites[part.site] for part in rewrite.splices if part.site is not None]
    private = {n for s in (*region.sites.values(), *used) for n in s.nodes}
    overlapping = _sites(regions)
    before = set(gm.graph.nodes) | set(replaced)
    for other in regions:
        other.ports = {name: replaced.get(n, n) for name, n in other.ports.items()}
        for site in other.sites.values():
            site.result = replaced.get(site.result, site.result)
    erase_dead(gm, private)
    for was in rewrite.moved:  # they lie in the new module now
        gm.delete_submodule(was)
    region.rewritten_by = pass_name
    kept = set(gm.graph.nodes) - set(replaced)
    gone = before - kept
    for other in regions:
        if other.host is not None and other.host.region.ports["y"] not in kept:
            other.host = None  # its module went into another graph
    for other in regions:
        taken = other is region or other.rewritten_by is not None or other.blocked is not None
        if taken or not gone & overlapping[id(other)]:
            continue
        inside = overlapping[id(other)] <= overlapping[id(region)]
        how = "it lies inside" if inside else "a part of it is"
        other.blocked = f"{how} {region.path}, which {pass_name} rewrote"
        if any(other is part for part in region.parts) and len(rewrite.splices) == 1:
            module = rewrite.splices[0].module
            if isinstance(module, RoutedModule) and module.hosts:
                other.host = Host(region, module)
    for order, node in enumerate(gm.graph.nodes):
        node.meta["order"] = order
    return names


def install(region: Region, rewrite: Rewrite, pass_name: str) -> dict[str, str]:
    """Put a module into the region's host; the graph stays. Returns as :func:`splice` does."""
    host, role = region.host, getattr(region, "role", "")
    if host is None or rewrite.hosted is None or role not in host.module.hosts:
        raise SparsifyBug(f"{pass_name} works inside {region.path}, which has no host")
    host.module.host(role, rewrite.hosted)
    region.rewritten_by = pass_name
    return {}


def _take_apart(
    gm: fx.GraphModule, node: fx.Node, old: tuple[fx.Node, ...]
) -> dict[fx.Node, fx.Node]:
    """One node per result of a module that returns a tuple, in place of the old results."""
    made: dict[fx.Node, fx.Node] = {}
    place = node
    for index, was in enumerate(old):
        with gm.graph.inserting_after(place):
            place = gm.graph.call_function(operator.getitem, (node, index))
        place.meta.update({k: v for k, v in was.meta.items() if k not in ("keep", "from_node")})
        place.meta["sparsify"] = node.meta["sparsify"]
        source = node if index == 0 else was  # the first was replaced by the module already
        new = place

        def reads(user: fx.Node) -> bool:
            return not (user.target is operator.getitem and user.args[0] is node)

        source.replace_all_uses_with(new, delete_user_cb=reads)
        made[was] = new
    return made


def _sites(regions: Iterable[Region]) -> dict[int, set[fx.Node]]:
    """id of a region -> the nodes that its sites compute with."""
    return {
        id(r): {n for site in r.sites.values() for n in (site.result, *site.nodes)} for r in regions
    }


def renamed(weights: Iterable[Moved], names: Mapping[str, str]) -> list[Moved]:
    """A weight map whose modules live under other names than their pass gave them."""
    found = []
    for move in weights:
        sparse, how = move.sparse, move.how
        for wanted, target in names.items():
            if sparse.startswith(f"{wanted}."):
                sparse = target + sparse.removeprefix(wanted)
                how = how.replace(f"{wanted}.", f"{target}.")
                break
        found.append(dataclasses.replace(move, sparse=sparse, how=how))
    return found


def finish(gm: fx.GraphModule) -> None:
    """After the last splice of a pass: drop unread weights, check the graph, make its code again.

    Once per pass, not per region: code for a 30-layer model takes half a second to make.
    """
    drop_unread(gm)
    gm.graph.lint()
    gm.recompile()


def _order(node: fx.Node) -> int:
    return int(node.meta.get("order", 0))


def _free_name(gm: fx.GraphModule, wanted: str) -> str:
    """``wanted``, numbered where the model has such an attribute already."""
    path, _, name = wanted.rpartition(".")
    parent: Any = gm
    for part in filter(None, path.split(".")):
        parent = getattr(parent, part, None)
    if parent is None or not hasattr(parent, name):
        return wanted
    number = 2
    while hasattr(parent, f"{name}_{number}"):
        number += 1
    return f"{wanted}_{number}"


def erase_dead(gm: fx.GraphModule, private: set[fx.Node]) -> None:
    """Erase nodes nobody reads (in-place operations only where they belong to ``private``)."""
    for node in reversed(list(gm.graph.nodes)):
        if node.users or node.op in ("placeholder", "output"):
            continue
        if node in private or node.op == "get_attr" or not _mutates(node):
            gm.graph.erase_node(node)


def _mutates(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return bool(schema is not None and schema.is_mutable) or op_base(node).endswith("_")


def drop_unread(gm: fx.GraphModule) -> None:
    """Delete weights and modules that no node names (other names of a tied tensor stay)."""
    names = {str(n.target) for n in gm.graph.nodes if n.op == "get_attr"}
    read = {id(attribute(gm, name)) for name in names}
    called = {str(n.target) for n in gm.graph.nodes if n.op == "call_module"}

    def clean(module: nn.Module, path: str) -> bool:
        if path in called:
            return True
        for store in (module._parameters, module._buffers):
            for name in [n for n, tensor in store.items() if id(tensor) not in read]:
                del store[name]
        for name, child in list(module._modules.items()):
            if child is None or not clean(child, f"{path}.{name}".lstrip(".")):
                del module._modules[name]
        return bool(module._parameters or module._buffers or module._modules)

    clean(gm, "")


def node_count(gm: fx.GraphModule) -> int:
    """Operations in the graph (inputs, outputs and weights not counted)."""
    return sum(n.op in ("call_function", "call_module", "call_method") for n in gm.graph.nodes)
