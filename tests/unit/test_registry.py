"""Finding passes: our files, other packages' entry points, clashes, and what is no pass."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import pytest

from sparsify import registry
from sparsify.errors import BadOption, PassClash, UnknownPass
from sparsify.text import parse

GOOD = '''
    """own-idea: what it does in a line.

    And more.
    """
    import dataclasses
    from sparsify import FeedForward, Pass, Rewrite, option

    @dataclasses.dataclass(frozen=True)
    class OwnIdea(Pass[FeedForward]):
        units: int = option(8, "units per layer", ge=2)
        active: float = option(1.0, "fraction", gt=0, le=1)
        split: str = option("cluster", "how", among=("cluster", "contiguous"))
        fast: bool = option(False, "whether")

        def rewrite(self, region: FeedForward) -> Rewrite:
            return Rewrite(())
'''


class Outside:
    """A folder of installed distributions that the test adds to ``sys.path``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def install(self, owner: str, name: str, source: str, target: str | None = None) -> None:
        """A distribution ``owner`` with one module and an entry point ``name`` for it."""
        module = target.partition(":")[0] if target else name.replace("-", "_")
        (self.folder / f"{module}.py").write_text(textwrap.dedent(source))
        info = self.folder / f"{owner.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {owner}\nVersion: 1.0\n")
        points = f"[{registry.GROUP}]\n{name} = {target or module}\n"
        (info / "entry_points.txt").write_text(points)


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Outside:
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    known = set(sys.modules)
    yield Outside(folder)
    for name in set(sys.modules) - known:
        if str(folder) in (getattr(sys.modules[name], "__file__", None) or ""):
            del sys.modules[name]


def test_built_in_passes_are_the_files(monkeypatch: pytest.MonkeyPatch) -> None:
    files = Path(registry.__file__).parent.joinpath("passes").glob("*.py")
    stems = {f.stem.replace("_", "-") for f in files if not f.stem.startswith("_")}
    assert stems == {n for n in registry.names() if registry.owner(n) == registry.OURS}
    assert stems >= {"ffn-moe", "attn-moh"}


def test_every_built_in_pass_is_well_formed() -> None:
    ours = {n for n in registry.names() if registry.owner(n) == registry.OURS}
    assert ours <= set(registry.all_passes())
    for name in ours:
        assert registry.get(name).name == name
        assert registry.get(name).options()


# ---------------------------------------------------------------------------- other packages


@pytest.mark.parametrize("target", [None, "own_idea:OwnIdea"])
def test_a_third_party_pass(outside: Outside, target: str | None) -> None:
    outside.install("acme-passes", "own-idea", GOOD, target)
    assert "own-idea" in registry.names()
    assert registry.owner("own-idea") == "acme-passes"
    assert "own_idea" not in sys.modules  # listing imports nothing
    cls = registry.get("own-idea")
    assert cls.summary == "own-idea: what it does in a line."
    (stage,) = parse("own-idea{units=4 fast=true}")
    work = registry.build(stage)
    assert (work.units, work.active, work.fast) == (4, 1.0, True)
    assert work.changed_options() == {"units": 4, "fast": True}


def test_what_is_installed_meanwhile_is_found(outside: Outside) -> None:
    assert "own-idea" not in registry.names()
    outside.install("acme-passes", "own-idea", GOOD)
    assert registry.owner("own-idea") == "acme-passes"
    assert registry.entries() == registry.entries()


def test_a_clash_with_ours_names_both(outside: Outside) -> None:
    outside.install("acme-passes", "ffn-moe", GOOD)
    with pytest.raises(PassClash) as caught:
        registry.get("ffn-moe")
    text = caught.value.render()
    assert "two packages register a pass named 'ffn-moe'" in text
    assert "sparsify-fx (sparsify.passes.ffn_moe) and acme-passes (ffn_moe)" in text
    assert "pip uninstall acme-passes" in text
    assert "attn-moh" in registry.all_passes()
    assert [p.what for p in registry.problems()] == [caught.value.what]


def test_a_clash_between_two_others(outside: Outside) -> None:
    outside.install("acme-passes", "own-idea", GOOD)
    outside.install("bolt-passes", "own-idea", GOOD, "other_idea")
    with pytest.raises(PassClash, match=r"acme-passes \(own_idea\) and bolt-passes"):
        registry.build(parse("own-idea")[0])


def replaced(old: str, new: str) -> str:
    assert old in GOOD
    return GOOD.replace(old, new)


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("raise RuntimeError('boom')", "RuntimeError: boom"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("def (", "SyntaxError"),
        ("import a_module_that_is_not_there", "ModuleNotFoundError"),
        ("x = 1", "holds none"),
        (GOOD + "\n    class Two(OwnIdea): pass\n", "holds OwnIdea, Two"),
        (replaced("    @dataclasses.dataclass(frozen=True)\n", ""), "is not decorated with"),
        (replaced("(frozen=True)", "()"), "cannot inherit non-frozen dataclass from a frozen one"),
        (replaced("def rewrite", "def rewrites"), "has no rewrite method"),
        (replaced("Pass[FeedForward]", "Pass"), "does not name its region type"),
        (replaced("split: str", "split: list"), "option 'split' is no int, float, str or bool"),
        (replaced("units: int = option(8", "units: int = option(1"), "is not legal"),
        (replaced("units: int = option(8", "units: int = option('8'"), "is not legal"),
        (replaced("units: int", "at: int"), "the option name 'at' belongs to the pipeline"),
        (GOOD[GOOD.index("    import") :], "neither the module nor the class has a docstring"),
    ],
)
def test_a_malformed_pass_breaks_only_itself(outside: Outside, source: str, why: str) -> None:
    outside.install("acme-passes", "own-idea", source)
    with pytest.raises(PassClash) as caught:
        registry.get("own-idea")
    text = caught.value.render()
    assert "the pass 'own-idea' of acme-passes cannot be used" in text
    assert why in text
    assert "pip uninstall acme-passes" in text
    assert {"ffn-moe", "attn-moh"} <= set(registry.all_passes())
    assert "own-idea" not in registry.all_passes()


def test_an_entry_point_to_something_else(outside: Outside) -> None:
    outside.install("acme-passes", "own-idea", "value = 3", "acme_module:value")
    with pytest.raises(PassClash, match="3 is not a subclass"):
        registry.get("own-idea")


def test_registered_under_another_name(outside: Outside) -> None:
    outside.install("acme-passes", "own", GOOD, "own_idea")
    with pytest.raises(PassClash, match="calls itself 'own-idea' but is registered as 'own'"):
        registry.get("own")


# ---------------------------------------------------------------------------- errors that point


def fault(text: str, kind: type[Exception]) -> list[str]:
    stage = parse(text)[0]
    with pytest.raises(kind) as caught:
        registry.build(stage)
    return str(caught.value.render()).splitlines()


def test_unknown_pass_points_and_suggests() -> None:
    assert fault("ffn-meo{experts=8},attn-moh", UnknownPass) == [
        "error: no pass named 'ffn-meo'",
        "  ffn-meo{experts=8},attn-moh",
        "  ^^^^^^^",
        "  help: did you mean 'ffn-moe'?",
    ]


def test_unknown_pass_without_a_likeness_lists_all() -> None:
    assert "ffn-moe" in fault("qqqq", UnknownPass)[-1]


@pytest.mark.parametrize(
    ("text", "message", "carets"),
    [
        ("own-idea{unit=4}", "own-idea has no option 'unit'", "         ^^^^"),
        ("own-idea{fast=true units=1}", "cannot be 1", "                         ^"),
        ("own-idea{units=many}", "takes int, not 'many'", "               ^^^^"),
        ("own-idea{active=1.5}", "cannot be 1.5", "                ^^^"),
        ("own-idea{active=true}", "takes float, not True", "                ^^^^"),
        ("own-idea{fast=1}", "takes bool, not 1", "              ^"),
        ("own-idea{split=clutser}", "cannot be 'clutser'", "               ^^^^^^^"),
    ],
)
def test_bad_options_point(outside: Outside, text: str, message: str, carets: str) -> None:
    outside.install("acme-passes", "own-idea", GOOD)
    lines = fault(text, BadOption)
    assert message in lines[0]
    assert lines[1:3] == [f"  {text}", f"  {carets}"]


def test_options_that_do_not_mix(outside: Outside) -> None:
    check = (
        "\n        def __post_init__(self) -> None:"
        "\n            if self.units == 5: raise ValueError('five is odd')\n"
    )
    outside.install("acme-passes", "own-idea", GOOD + check)
    lines = fault("own-idea{units=5}", BadOption)
    assert lines[0] == "error: own-idea cannot take these options"
    assert lines[1] == "  five is odd"
