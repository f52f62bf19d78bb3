"""The machine that kernels are made for: vector instructions, cores, caches, and its short name.

What is compiled with ``-march=native``, or was tuned here, must not be used on another processor,
though both may share a home directory: cache keys carry :attr:`Machine.key`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
LANES = {"avx512": 16, "avx2": 8, "neon": 4, "generic": 4}


@dataclasses.dataclass(frozen=True)
class Machine:
    """One processor.

    Attributes:
        isa: ``avx512`` (avx512f), ``avx2`` (with fma), ``neon`` or ``generic``.
        cores: that this process may use.
        l1, l2, l3: bytes of data cache that core 0 sees at each level; 0 = unknown.
        model: the processor's name.
        flags: its features, sorted, as the system lists them.
    """

    isa: str
    cores: int
    l1: int
    l2: int
    l3: int
    model: str
    flags: tuple[str, ...] = ()

    @property
    def lanes(self) -> int:
        """float32 numbers in one vector register."""
        return LANES[self.isa]

    @property
    def key(self) -> str:
        """``avx2-2c-1f0a9c3b``: equal only where compiled code and timings can be shared."""
        told = repr((platform.system(), platform.machine(), dataclasses.astuple(self)))
        return f"{self.isa}-{self.cores}c-{hashlib.sha256(told.encode()).hexdigest()[:8]}"


@functools.cache
def machine() -> Machine:
    """This machine."""
    about = _cpuinfo()
    flags = tuple(sorted(set((about.get("flags") or about.get("features") or "").split())))
    cache = _caches()
    return Machine(
        isa=isa_of(flags, platform.machine()),
        cores=usable_cores(),
        l1=cache.get(1, 0),
        l2=cache.get(2, 0),
        l3=cache.get(3, 0),
        model=about.get("model name") or platform.processor() or platform.machine(),
        flags=flags,
    )


def isa_of(flags: tuple[str, ...], architecture: str) -> str:
    """The widest vector instructions among the processor's features."""
    if "avx512f" in flags:
        return "avx512"
    if "avx2" in flags and "fma" in flags:
        return "avx2"
    if "asimd" in flags or architecture in ("aarch64", "arm64"):
        return "neon"
    return "generic"


def usable_cores() -> int:
    """Cores that this process may run on: containers often grant fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpuinfo() -> dict[str, str]:
    """Lower-case field -> value of the first processor; empty where the system has no such file."""
    found: dict[str, str] = {}
    try:
        text = CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return found
    for line in text.splitlines():
        name, colon, value = line.partition(":")
        if colon:
            found.setdefault(name.strip().lower(), value.strip())
    return found


def _caches() -> dict[int, int]:
    """Level -> bytes of the caches that hold data."""
    found: dict[int, int] = {}
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    for folder in sorted(CACHES.glob("index*")):
        try:
            level, kind, size = (
                (folder / name).read_text(encoding="ascii").strip()
                for name in ("level", "type", "size")
            )
            if kind != "Instruction":
                found[int(level)] = int(size.rstrip("KMG")) * units.get(size[-1], 1)
        except (OSError, ValueError):
            continue
    return found
