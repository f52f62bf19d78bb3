"""Verbs about sparsify itself: passes, env."""

from __future__ import annotations

import inspect
import sys
from typing import Annotated, Any

import typer

from sparsify import registry
from sparsify.cli import show
from sparsify.cli.app import JsonFlag, app
from sparsify.core import Pass


@app.command()
def passes(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Show one pass.", show_default=False)
    ] = None,
    json: JsonFlag = False,
) -> None:
    """List the passes, or explain one."""
    if name is not None:
        found = registry.get(name)
        print(show.as_json(_facts(found)) if json else explain(found))
        return
    known, problems = registry.survey()
    for problem in problems:
        print(f"warning: {problem}", file=sys.stderr)
    if json:
        print(show.as_json([_facts(p) for p in known.values()]))
    elif known:
        rows = [(n, p.region_type.kind, _summary(p)) for n, p in known.items()]
        print(show.table(rows))
        print("\nsparsify passes NAME   explains one and lists its options")


@app.command()
def env(json: JsonFlag = False) -> None:
    """Show versions and machine."""
    from sparsify.cli import machine

    found = machine.facts()
    if json:
        print(show.as_json(found))
        return
    versions = found.pop("packages")
    assert isinstance(versions, dict)
    rows = [(key, _plain(value)) for key, value in found.items()]
    rows += [(key, value or "not installed") for key, value in versions.items()]
    print(show.table(rows))


def explain(found: type[Pass[Any]]) -> str:
    """The documentation of a pass and its option table."""
    doc = _doc(found)
    rows = [
        (o.name, o.type, f"{str(o.default).lower() if o.type == 'bool' else o.default}", o.help)
        for o in found.options()
    ]
    legal = {o.name: o.legal for o in found.options()}
    rows = [(n, t, d, f"{h} ({legal[n]})" if legal[n] else h) for n, t, d, h in rows]
    rows += [
        ("at", "paths", "*", "regions to work on, as in model.layers.[4-27].mlp"),
        ("skip", "paths", "", "regions to leave alone"),
    ]
    head = ("option", "type", "default", "meaning")
    owner = registry.owner(found.name)
    facts = f"works on {found.region_type.kind}; claims {found.claim}; from {owner}"
    return f"{doc}\n\n{facts}\n\n{show.table([head, *rows])}"


def _doc(found: type[Pass[Any]]) -> str:
    return inspect.getdoc(sys.modules[found.__module__]) or inspect.getdoc(found) or ""


def _summary(found: type[Pass[Any]]) -> str:
    """The docstring's first line without the pass name that it may begin with."""
    return found.summary.removeprefix(f"{found.name}:").strip()


def _facts(found: type[Pass[Any]]) -> dict[str, Any]:
    return {
        "name": found.name,
        "summary": _summary(found),
        "region": found.region_type.kind,
        "claim": str(found.claim),
        "owner": registry.owner(found.name),
        "options": [
            {"name": o.name, "type": o.type, "default": o.default, "legal": o.legal, "help": o.help}
            for o in found.options()
        ],
    }


def _plain(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value)
