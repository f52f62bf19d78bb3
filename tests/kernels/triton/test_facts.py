"""Static facts and traffic of every registered kernel, and the goldens of both.

The default run compiles some kernels, one for each;
the slow run compiles all for all, and holds ``golden/kernels/<name>.facts.txt``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import triton

from sparsify.codegen.triton import facts, traffic
from sparsify.codegen.triton.dump import text_of
from sparsify.codegen.triton.spec import KernelSpec, registered

GOLDEN = Path(__file__).resolve().parents[3] / "golden"
ALL = list(registered())
# Compiled in the default run: the ones that use the most of a machine, each for one target.
SOME = {
    "attend_prefill": "sm_80",
    "attend_decode": "sm_90",
    "linear_gemm": "sm_100",
    "columns_gemm": "gfx942",
}
MOST = 1.1  # bytes moved against the least


def hold(spec: KernelSpec, target: str, found: facts.Facts) -> None:
    assert found.spills == 0, f"{spec.name} spills on {target}: {found.line()}"
    if spec.gemm:
        assert found.tensor_cores > 0, f"{spec.name} on {target}: no tensor-core instruction"


def test_some_kernels_do_not_spill_and_use_tensor_cores() -> None:
    specs = {spec.name: spec for spec in ALL}
    assert set(SOME.values()) == set(facts.TARGETS)
    for (name, target), found in facts.measure(list(SOME.items())).items():
        hold(specs[name], target, found)


@pytest.mark.slow
@pytest.mark.parametrize("spec", ALL, ids=lambda s: s.name)
def test_facts_are_as_accepted(
    spec: KernelSpec, golden: Callable[[str, str], None], accept: bool
) -> None:
    """Register counts are those of one triton: another one's are held to the laws only."""
    found = facts.measure([(spec.name, target) for target in facts.TARGETS])
    for target in facts.TARGETS:
        hold(spec, target, found[spec.name, target])
    name = f"kernels/{spec.name}.facts.txt"
    golden_file = GOLDEN / name
    text = facts_text(spec, found)
    first = golden_file.read_text().splitlines()[0] if golden_file.exists() else text
    if accept or f"triton {triton.__version__}," in first:
        golden(name, text)


def facts_text(spec: KernelSpec, found: Mapping[tuple[str, str], facts.Facts]) -> str:
    made = f"triton {triton.__version__}, {spec.num_warps} warps, {spec.num_stages} stages"
    lines = [f"{spec.name}: {made}"]
    lines += [found[spec.name, target].line() for target in facts.TARGETS]
    if spec.sample is not None:
        with traffic.count() as counted:
            least = spec.sample()
        lines.append(
            f"traffic: {counted.moved} bytes moved, {least} at least"
            f" ({counted.moved / least:.3f}); {counted.issued} issued, {counted.launches} launches"
        )
    return "\n".join(lines)


@pytest.mark.parametrize("spec", [s for s in ALL if s.sample], ids=lambda s: s.name)
def test_little_more_is_moved_than_has_to_be(spec: KernelSpec) -> None:
    assert spec.sample is not None
    with traffic.count() as counted:
        least = spec.sample()
    # above the least: index lists and partial sums; below it: nothing can be right
    assert least * 0.95 <= counted.moved <= MOST * least


@pytest.mark.parametrize("spec", ALL, ids=lambda s: s.name)
def test_kernels_read_as_accepted(spec: KernelSpec, golden: Callable[[str, str], None]) -> None:
    golden(f"kernels/{spec.name}.py", text_of(spec))


def test_gemms_multiply_matrices() -> None:
    gemms = [spec for spec in ALL if spec.gemm]
    assert gemms
    for spec in gemms:
        assert "tl.dot" in text_of(spec), spec.name
