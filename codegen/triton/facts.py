"""Static facts of compiled kernels: registers, spills, shared memory, tensor-core instructions.

Kernels compile without a GPU (:class:`GPUTarget` names one), to a cubin that ``cuobjdump`` and
``nvdisasm`` read, or to AMDGCN text. Spilled registers are counted as the machine instructions that
move them (``LDL``/``STL``; the spill counts in AMDGCN's metadata), so what is read is what would
run.

Compilation has to happen in a process where ``TRITON_INTERPRET`` is not set: :func:`measure` starts
one, with a kernel cache of its own (a stale cache would be believed).
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sparsify.errors import SparsifyBug

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
_TENSOR = {  # opcode prefix -> what the field calls it
    "HMMA": "mma.sync",
    "HGMMA": "wgmma",
    "UTCHMMA": "tcgen05",
    "v_mfma_": "mfma",
}


@dataclasses.dataclass(frozen=True)
class Facts:
    """What one compiled kernel needs and does.

    Attributes:
        target: ``sm_80`` ... ``gfx942``.
        registers: per thread (AMD: vector registers, accumulation registers included).
        spills: instructions that spill or reload (NVIDIA), registers spilled (AMD).
        shared: bytes of shared memory (AMD: LDS) per program.
        tensor: tensor-core instructions by name, e.g. ``{"wgmma": 8}``.
        memory: global loads, stores and atomics by opcode.
        instructions: all of them.
    """

    target: str
    registers: int
    spills: int
    shared: int
    tensor: dict[str, int]
    memory: dict[str, int]
    instructions: int

    @property
    def tensor_cores(self) -> int:
        """Tensor-core instructions of any kind."""
        return sum(self.tensor.values())

    def line(self) -> str:
        """One line of the golden text."""
        used = " ".join(f"{k}={v}" for k, v in sorted(self.tensor.items())) or "none"
        moves = " ".join(f"{k}={v}" for k, v in sorted(self.memory.items()))
        return (
            f"{self.target:<7} registers={self.registers} spills={self.spills}"
            f" shared={self.shared} instructions={self.instructions} tensor: {used} memory: {moves}"
        )


def compile_for(spec: Any, target: str) -> Facts:
    """Compile one :class:`~sparsify.codegen.triton.spec.KernelSpec`; not in interpreter mode."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise SparsifyBug("kernels cannot be compiled in a process in interpreter mode")
    names = list(spec.kernel.arg_names)
    signature = {n: spec.signature.get(n, "constexpr") for n in names}
    missing = [n for n in names if signature[n] == "constexpr" and n not in spec.constexprs]
    unknown = sorted((spec.signature.keys() | spec.constexprs.keys()) - set(names))
    if missing or unknown:
        raise SparsifyBug(
            f"the spec of {spec.name} does not fit: {missing} missing, {unknown} extra"
        )
    attrs = {
        (at,): [["tt.divisibility", 16]]
        for at, n in enumerate(names)
        if signature[n].startswith("*") or n in spec.aligned
    }
    source = ASTSource(spec.kernel, signature, dict(spec.constexprs), attrs)
    amd = target.startswith("gfx")
    gpu = GPUTarget("hip", target, 64) if amd else GPUTarget("cuda", int(target[3:]), 32)
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages}
    made = triton.compile(source, target=gpu, options=options)
    if amd:
        return _from_amdgcn(target, made.asm["amdgcn"], made.metadata.shared)
    return _from_cubin(target, made.asm["cubin"], made.metadata.shared)


def _from_amdgcn(target: str, text: str, shared: int) -> Facts:
    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        return int(found.group(1)) if found else 0

    code = re.findall(r"^\s+((?:v|s|global|buffer|flat|ds|scratch)_[a-z0-9_]+)", text, re.M)
    spills = number("vgpr_spill_count") + number("sgpr_spill_count")
    return Facts(
        target,
        number("vgpr_count"),
        spills + sum(op.startswith("scratch_") for op in code),
        shared,
        _tensor(code),
        _count(op for op in code if op.startswith(("global_", "buffer_", "flat_"))),
        len(code),
    )


def _from_cubin(target: str, cubin: bytes, shared: int) -> Facts:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        usage = _tool("cuobjdump", "--dump-resource-usage", str(file))
        text = _tool("nvdisasm", "-c", str(file))
    found = re.search(r"REG:(\d+)", usage)
    if not found:
        raise SparsifyBug(f"cuobjdump names no register count: {usage[:200]}")
    code = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", text, re.M)
    bare = [op.split(".")[0] for op in code]
    moves = ("LDG", "STG", "RED", "REDG", "ATOM", "ATOMG", "LDGSTS", "UBLKCP", "UTMALDG", "UTMASTG")
    return Facts(
        target,
        int(found.group(1)),
        sum(op in ("LDL", "STL") for op in bare),
        shared,
        _tensor(code),
        _count(_width(op) for op, b in zip(code, bare, strict=True) if b in moves),
        len([op for op in bare if op != "NOP"]),
    )


def _width(op: str) -> str:
    """``LDG.128`` for ``LDG.E.LTC128B.128.CONSTANT``: the opcode with its bits."""
    parts = op.split(".")
    bits = [p for p in parts[1:] if p in ("U8", "S8", "U16", "S16", "64", "128")]
    return ".".join([parts[0], bits[0] if bits else "32"])


def _tensor(code: Iterable[str]) -> dict[str, int]:
    found = (name for op in code for start, name in _TENSOR.items() if op.startswith(start))
    return _count(found)


def _count(words: Iterable[str]) -> dict[str, int]:
    return dict(sorted(collections.Counter(words).items()))


def _tool(name: str, *args: str) -> str:
    """Output of a program that triton ships."""
    import triton

    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    done = subprocess.run([str(program), *args], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SparsifyBug(f"{name} failed: {done.stderr.strip()[:300]}")
    return done.stdout


def measure(wanted: Sequence[tuple[str, str]]) -> dict[tuple[str, str], Facts]:
    """Facts of (kernel name, target) pairs, compiled in one process of their own."""
    drop = ("TRITON_INTERPRET", "TRITON_CACHE_DIR")
    env = {k: v for k, v in os.environ.items() if k not in drop}
    root = Path(__file__).resolve().parents[2]
    with tempfile.TemporaryDirectory() as cache:
        env["TRITON_CACHE_DIR"] = cache
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), env.get("PYTHONPATH", "")]))
        done = subprocess.run(
            [sys.executable, "-m", "sparsify.codegen.triton.facts"],
            input=json.dumps(list(wanted)),
            capture_output=True,
            text=True,
            env=env,
            check=False,
        )
    if done.returncode:
        raise SparsifyBug(f"compiling kernels failed:\n{done.stderr.strip()[-3000:]}")
    rows = json.loads(done.stdout.strip().splitlines()[-1])
    return {(name, facts["target"]): Facts(**facts) for name, facts in rows}


def _main() -> None:
    from sparsify.codegen.triton.spec import find

    pairs = json.loads(sys.stdin.read())
    rows = [(name, dataclasses.asdict(compile_for(find(name), target))) for name, target in pairs]
    sys.stdout.write(json.dumps(rows) + "\n")


if __name__ == "__main__":
    _main()
