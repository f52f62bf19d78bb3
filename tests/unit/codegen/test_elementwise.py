"""Activations as scalar C code: equal to ATen within rounding, refused where not known."""

from __future__ import annotations

import ctypes
import json
import shutil
import subprocess
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sparsify.codegen.elementwise import (
    CannotLower,
    c_source,
    canonical,
    lower,
    lower_gradient,
    triton_source,
)
from sparsify.runtime.program import Program, Ref, Step
from tests.kernels.activations import FILE, further_programs, grid, value_and_bound, zoo_programs

PROGRAMS = {**zoo_programs(), **further_programs()}
GCC = shutil.which("gcc") or shutil.which("cc")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """All programs compiled into one shared library: ``run_<i>(n, up, gate, out)``."""
    if GCC is None:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("c")
    text, helpers = "#include <math.h>\n", set[str]()
    for i, program in enumerate(PROGRAMS.values()):
        source = c_source(program, f"act_{i}")
        helper, main = source.rsplit("static inline float act_", 1)
        for part in helper.split("static inline"):
            if part.strip() and part not in helpers:
                helpers.add(part)
                text += "static inline" + part
        call = "up[j], gate[j]" if len(program.inputs) == 2 else "up[j]"
        text += f"static inline float act_{main}"
        text += f"""
void run_{i}(long n, const float *up, const float *gate, float *out) {{
    for (long j = 0; j < n; j++) out[j] = act_{i}({call});
}}
"""
    (folder / "act.c").write_text(text)
    flags = ["-O2", "-Wall", "-Werror", "-Wno-unused-parameter", "-fPIC", "-shared"]
    command = [GCC, *flags, "act.c", "-o", "act.so", "-lm"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(folder / "act.so"))


def run(library: ctypes.CDLL, name: str, inputs: tuple[Tensor, ...]) -> Tensor:
    out = torch.empty_like(inputs[0])
    call = getattr(library, f"run_{list(PROGRAMS).index(name)}")
    call.argtypes = [ctypes.c_long, *[ctypes.c_void_p] * 3]
    call(out.numel(), inputs[0].data_ptr(), inputs[-1].data_ptr(), out.data_ptr())
    return out


@pytest.mark.parametrize("name", PROGRAMS)
def test_c(library: ctypes.CDLL, name: str) -> None:
    program = PROGRAMS[name]
    inputs = grid(program)
    exact, bound = value_and_bound(lower(program), *inputs)[0]
    aten = program(*inputs)
    for found in (run(library, name, inputs), aten):  # the lowering means what ATen means
        assert ((found == exact) | ((found.double() - exact).abs() <= bound)).all()
    # The bound says something.
    assert (bound < 1e-4 * (1 + exact.abs())).double().mean() > 0.9 or name in ("cast", "half")


@pytest.mark.parametrize("name", PROGRAMS)
def test_c_special_values(library: ctypes.CDLL, name: str) -> None:
    program = PROGRAMS[name]
    values = torch.tensor([float("nan"), 1.0, -1.0, 0.0])
    pairs = torch.meshgrid(*[values] * len(program.inputs), indexing="ij")
    inputs = tuple(t.flatten() for t in pairs)
    found, aten = run(library, name, inputs), program(*inputs).float()
    assert torch.equal(found.isnan(), aten.isnan())


@pytest.mark.parametrize("name", PROGRAMS)
def test_gradient(name: str) -> None:
    """The steps of the derivative, evaluated in float64, are autograd's."""
    program = PROGRAMS[name]
    if name in ("cast", "half"):
        pytest.skip("float64 evaluation does not round as ATen's casts do")
    inputs = tuple(t.double().requires_grad_() for t in grid(program, 31))
    grad = torch.linspace(-1, 1, inputs[0].numel(), dtype=torch.float64)
    value = program(*inputs)
    wanted = torch.autograd.grad(value, inputs, grad, allow_unused=True)
    _, *found = value_and_bound(lower_gradient(program), *[i.detach() for i in inputs], grad)
    for mine, theirs in zip(found, wanted, strict=True):
        theirs = torch.zeros_like(grad) if theirs is None else theirs
        finite = value.isfinite()  # 1 / x ** 3 at zero
        # ATen holds some constants (1/6) in float32.
        torch.testing.assert_close(mine[0][finite], theirs[finite], rtol=2.0**-24, atol=1e-9)


@pytest.mark.parametrize(
    ("op", "args"),
    [
        ("aten.sin.default", ()),
        ("aten.pow.Tensor_Scalar", (1.5,)),
        ("aten._to_copy.default", ()),
        ("aten.dropout.default", (0.1, True)),
        ("aten.gelu.default", ()),
        ("aten.relu_.default", ()),
    ],
)
def test_refused(op: str, args: tuple[object, ...]) -> None:
    kwargs = {"aten._to_copy.default": {"dtype": torch.int32}, "aten.gelu.default": {"new": 1}}
    program = Program(("up",), (Step("y", op, (Ref("up"), *args), kwargs.get(op, {})),), "y")
    for write in (lower, c_source, triton_source):
        with pytest.raises(CannotLower, match=r"has no scalar code"):
            write(program)


def test_conditions_are_no_numbers() -> None:
    compare = Step("c", "aten.gt.Scalar", (Ref("up"), 0.0))
    for last in (
        Step("y", "aten.mul.Tensor", (Ref("up"), Ref("c"))),
        Step("y", "aten.where.self", (Ref("up"), Ref("up"), 0.0)),
    ):
        with pytest.raises(CannotLower):
            lower(Program(("up",), (compare, last), "y"))
    with pytest.raises(CannotLower):
        lower(Program(("up",), (compare,), "c"))


def test_canonical_and_wide() -> None:
    program = PROGRAMS["extremes"]
    again = canonical(program)
    assert [s.name for s in again.steps] != [s.name for s in program.steps]
    assert c_source(again) == c_source(program)
    inputs = grid(program, 5)
    assert torch.equal(again(*inputs), program(*inputs))
    with pytest.raises(CannotLower, match="float64"):
        lower(Program(("up",), (), "up", wide=True))


def _different(programs: dict[str, Program]) -> dict[str, object]:
    seen: dict[str, tuple[str, object]] = {}
    for name, program in programs.items():
        plain = canonical(program).to_json()
        seen.setdefault(json.dumps(plain), (name, plain))
    return dict(seen.values())


@pytest.mark.slow
def test_all_activations_of_the_zoo(golden: Callable[[str, str], None]) -> None:
    """The stored programs are those of all zoo models' feed-forward layers."""
    from sparsify.match import find
    from sparsify.regions import FeedForward
    from tests.contract.zoo_captures import MODELS, captured

    programs = {}
    for model in MODELS:
        cap = captured(model)
        for region in find(cap.graph, cap.example).of(FeedForward):
            programs[f"{model}: {region.activation_name}"] = region.activation
    golden(FILE, json.dumps(_different(programs), indent=1))
