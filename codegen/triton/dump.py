"""Kernels as files to read: ``sparsify compile --emit-triton DIR``.

One Python file for each kernel, which imports by itself (triton is all that it needs): the kernel's
source with every function that it calls, and the specialisation that its static facts are of.
"""

from __future__ import annotations

import inspect
import textwrap
from pathlib import Path
from typing import Any

from torch import nn

from sparsify import __version__
from sparsify.codegen.plan import working
from sparsify.codegen.triton.lower import kernel_of, specs_of
from sparsify.codegen.triton.spec import KernelSpec
from sparsify.core import Refused, Remark
from sparsify.errors import NothingRewritten, OutputError
from sparsify.runtime.files import write_text


def _function(value: Any) -> Any:
    """The Python function behind what ``triton.jit`` made, or None."""
    inner = getattr(value, "fn", None)
    return inner if inspect.isfunction(inner) else None


def _sources(function: Any, seen: dict[str, str]) -> None:
    """Source of ``function`` and of the jitted functions it calls, callees first; constants too."""
    if function.__name__ in seen:
        return
    seen[function.__name__] = ""
    names = set(function.__code__.co_names)
    for name in sorted(names & function.__globals__.keys()):
        value = function.__globals__[name]
        called = _function(value)
        if called is not None:
            _sources(called, seen)
        elif isinstance(value, int | float | str):
            seen[name] = f"{name} = {value!r}"
        elif type(value).__name__ == "constexpr":
            seen[name] = f"{name} = tl.constexpr({value.value!r})"
    del seen[function.__name__]
    seen[function.__name__] = textwrap.dedent(inspect.getsource(function)).rstrip()


def text_of(spec: KernelSpec, *, used_by: str = "") -> str:
    """The kernel as the text of a Python file."""
    found: dict[str, str] = {}
    constants = []
    for name, value in spec.constexprs.items():
        function = _function(value)
        if function is not None:
            _sources(function, found)
        constants.append(f"    {name!r}: {value!r}," if function is None else
                         f"    {name!r}: {function.__name__},")  # fmt: skip
    _sources(_function(spec.kernel), found)
    types = [f"    {name!r}: {kind!r}," for name, kind in spec.signature.items()]
    head = [
        f'"""{spec.name}: written by sparsify {__version__} (sparsify compile --emit-triton).',
        "",
        "The source that Triton compiles, for reading and for trying changes; sparsify runs its",
        "own copy. SIGNATURE, CONSTANTS and LAUNCH are one specialisation, the one whose facts the",
        "tests hold; at run time sizes are those of the call.",
        *(textwrap.wrap(f"Used by {used_by}.", 99) if used_by else []),
        '"""',
        "",
        "import triton",
        "import triton.language as tl",
        "",
    ]
    plain = [text for text in found.values() if not text.startswith("@")]
    kernels = [text for text in found.values() if text.startswith("@")]
    tail = [
        "SIGNATURE = {", *types, "}", "CONSTANTS = {", *constants, "}",
        f"LAUNCH = {{'num_warps': {spec.num_warps}, 'num_stages': {spec.num_stages}}}",
    ]  # fmt: skip
    blocks = ["\n".join(head + plain).rstrip(), *kernels, "\n".join(tail)]
    return "\n\n\n".join(blocks) + "\n"


def kernels_in(model: nn.Module) -> tuple[dict[str, tuple[KernelSpec, list[str]]], list[Remark]]:
    """Kernels that the model's routed modules use, by name, with the paths; what has none, why."""
    found: dict[str, tuple[KernelSpec, list[str]]] = {}
    left = []
    for path, module in working(model):
        try:
            kernel_of(module)
        except Refused as why:
            kind = type(module).__name__
            text, more = why.reason, why.suggestion
            left.append(Remark("left", module.pass_name, path, kind, text, more))
            continue
        for spec in specs_of(module):
            found.setdefault(spec.name, (spec, []))[1].append(path)
    return found, left


def emit(
    model: nn.Module, directory: str | Path, *, force: bool = False
) -> tuple[list[Path], list[Remark]]:
    """Write the kernels that ``model`` uses; returns the files, and what has no kernel.

    Every file is written under another name and renamed. Raises OutputError where one is there
    already (without ``force``; nothing is written then) or cannot be written, NothingRewritten
    where no module has a kernel.
    """
    found, left = kernels_in(model)
    if not found:
        why = left[0].reason if left else "it has no routed module"
        raise NothingRewritten("the model uses no Triton kernel", why=why)
    folder = Path(directory)
    files = {folder / f"{name}.py": entry for name, entry in found.items()}
    taken = sorted(file for file in files if file.exists())
    if taken and not force:
        raise OutputError(f"{taken[0]} exists already", help="--force replaces it")
    texts = {file: text_of(spec, used_by=_few(paths)) for file, (spec, paths) in files.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, text in texts.items():
            write_text(file, text)
    except OSError as error:
        raise OutputError(f"cannot write kernels to {folder}", why=str(error)) from error
    return sorted(texts), left


def _few(paths: list[str]) -> str:
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return ", ".join(paths[:3]) + more
