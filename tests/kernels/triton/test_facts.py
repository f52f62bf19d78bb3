"""Static facts and traffic of every registered kernel, and the goldens of both.

The default run compiles some kernels, one for each;
the slow run compiles all for all, and holds ``golden/kernels/<name>.facts.txt``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

from sparsify.codegen.triton import facts, traffic
from sparsify.codegen.triton.dump import text_of
from sparsify.codegen.triton.spec import KernelSpec, registered
from sparsify.codegen.triton.traffic import MOST

GOLDEN = Path(__file__).resolve().parents[3] / "golden"
ALL = list(registered())
# Compiled in the default run: the ones that use the most of a machine, each for one target.
SOME = {
    "attend_prefill": "sm_80",
    "attend_decode": "sm_90",
    "linear_gemm": "sm_100",
    "columns_gemm": "gfx942",
}


def hold(spec: KernelSpec, target: str, found: facts.Facts) -> None:
    assert found.spills == 0, f"{spec.name} spills on {target}: {found.line()}"
    if spec.gemm:
        assert found.tensor_cores > 0, f"{spec.name} on {target}: no tensor-core instruction"


@pytest.mark.slow
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
        lines += traffic_lines(*_counted(spec.sample))
    return "\n".join(lines)


def traffic_lines(sample: traffic.Sample, found: traffic.Traffic) -> list[str]:
    ratio = found.moved / sample.least
    first = f"traffic: {found.moved} bytes moved, {sample.least} at least ({ratio:.3f})"
    if sample.between:
        least = sample.least + sample.between
        first += f", with {sample.between} between launches {least} ({found.moved / least:.3f})"
    lines = [f"{first}; {found.issued} issued, {found.launches} launches"]
    for name, moved in sorted(found.by.items()):
        least = sample.own.get(name, 0)
        lines.append(
            f"  {name}: {moved}" + (f", {least} at least ({moved / least:.3f})" if least else "")
        )
    return lines + ([f"  {sample.why}"] if sample.why else [])


@functools.cache  # kernels of one operator share its sample
def _counted(make: Callable[[], traffic.Sample]) -> tuple[traffic.Sample, traffic.Traffic]:
    sample = make()
    with traffic.count() as found:
        sample.run()
    return sample, found


def _samples() -> dict[str, list[KernelSpec]]:
    groups: dict[Any, list[KernelSpec]] = {}
    for spec in ALL:
        if spec.sample is not None:
            groups.setdefault(spec.sample, []).append(spec)
    return {"+".join(s.name for s in specs): specs for specs in groups.values()}


@pytest.mark.parametrize("specs", _samples().values(), ids=_samples())
def test_little_more_is_moved_than_has_to_be(specs: list[KernelSpec]) -> None:
    """Above the least: index lists and partial sums; below it: nothing can be right."""
    assert specs[0].sample is not None
    sample, found = _counted(specs[0].sample)
    least = sample.least + sample.between
    assert sample.least * 0.95 <= found.moved
    assert {spec.source_name for spec in specs} <= found.by.keys()
    # A reason is given for what is above, and only for that.
    assert (found.moved > MOST * least) == bool(sample.why), traffic_lines(sample, found)
    assert sample.own or not sample.why
    for name, own in sample.own.items():
        assert own * 0.95 <= found.by[name] <= MOST * own, traffic_lines(sample, found)


def test_eager_steps_are_counted_and_views_are_not() -> None:
    x = torch.zeros(10, 32)
    with traffic.count() as found:
        x.t().view(32, 10).new_empty(7)
        x.to(torch.float32)
        assert not found.moved
        x.to(torch.float16)  # read and written
    assert dict(found.by) == {"eager": 10 * 32 * (4 + 2)} and found.moved == found.issued
    with traffic.count() as found:
        x.add_(1.0)
    assert found.moved == 10 * 32 * 4 * 2


def test_every_product_is_counted() -> None:
    assert not [spec.name for spec in ALL if spec.sample is None and spec.gemm]


@pytest.mark.parametrize("spec", ALL, ids=lambda s: s.name)
def test_kernels_read_as_accepted(spec: KernelSpec, golden: Callable[[str, str], None]) -> None:
    golden(f"kernels/{spec.name}.py", text_of(spec))


def test_gemms_multiply_matrices() -> None:
    gemms = [spec for spec in ALL if spec.gemm]
    assert gemms
    for spec in gemms:
        assert "tl.dot" in text_of(spec), spec.name
