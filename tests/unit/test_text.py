"""The pipeline grammar: what it reads, what it prints, and where it points when it cannot."""

from __future__ import annotations

import string
import textwrap
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsify.errors import BadInput, GrammarError, SparsifyError
from sparsify.text import Source, StageText, match_path, parse, shortened, unparse
from sparsify.text_paths import bad_pattern


def fault(text: str, kind: type[SparsifyError] = GrammarError) -> str:
    with pytest.raises(kind) as caught:
        parse(text)
    return caught.value.render()


# ---------------------------------------------------------------------------- reading


def test_example_of_the_design() -> None:
    text = "ffn-moe{experts=8 active=0.5 at=model.layers.[4-27].mlp},attn-moh{active=0.75 shared=2}"
    ffn, attn = parse(text)
    assert (ffn.name, ffn.options) == ("ffn-moe", {"experts": 8, "active": 0.5})
    assert (ffn.at, ffn.skip) == ("model.layers.[4-27].mlp", None)
    assert (attn.name, attn.options) == ("attn-moh", {"active": 0.75, "shared": 2})
    assert unparse((ffn, attn)) == text


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("8", 8), ("-3", -3), ("+3", 3), ("0.5", 0.5), (".5", 0.5), ("1.", 1.0), ("1e-3", 1e-3),
        ("2E5", 2e5), ("true", True), ("False", False), ("TRUE", "TRUE"), ("ridge", "ridge"),
        ("a/b.c-d", "a/b.c-d"), ("1-2", "1-2"), ("nan", "nan"), ("inf", "inf"), ('"8"', "8"),
        ("'a b'", "a b"), (r"'it\'s'", "it's"), (r'"a\"b\n"', 'a"b\n'), ('""', ""), ("ü", "ü"),
    ],
)  # fmt: skip
def test_values(written: str, value: object) -> None:
    (stage,) = parse(f"p{{x={written}}}")
    assert stage.options["x"] == value
    assert type(stage.options["x"]) is type(value)


def test_blanks_comments_and_newlines_are_free() -> None:
    text = """
    # what we found best
    ffn-moe {   # fine experts
        experts = 64, active=0.5
        at = "*.mlp"
    }
    attn-moh   # a new line separates too
    , ffn-upcycle{}
    """
    assert unparse(parse(text)) == "ffn-moe{experts=64 active=0.5 at=*.mlp},attn-moh,ffn-upcycle"


def test_selectors_stay_text() -> None:
    (stage,) = parse("p{at=0 skip=true}")
    assert (stage.at, stage.skip, stage.options) == ("0", "true", {})


def test_options_of_some_regions_only() -> None:
    text = 'p{active=0.5 active@*.[2-3].mlp=0.7 x@"a b"=true active@*.3.mlp=1 skip=*.9.*}'
    (stage,) = parse(text)
    assert stage.options == {"active": 0.5}
    assert stage.options_at("h.1.mlp") == {"active": 0.5}
    assert stage.options_at("h.2.mlp") == {"active": 0.7}
    assert stage.options_at("h.3.mlp") == {"active": 1}  # the last that matches
    assert stage.options_at("a b") == {"active": 0.5, "x": True}
    assert str(stage) == text
    assert parse("p{active@*=1, x=2}")[0].options == {"x": 2}


def test_many_local_options_are_shortened_for_reports() -> None:
    few = 'a{x=1 active@*.[0,2].mlp=0.5 active@"b c"=0.25 at=*},b'
    assert shortened(few) == few
    many = "a{x=1 " + " ".join(f"active@m.{n}.mlp=0.{n}" for n in range(1, 7)) + " at=*},b{y=2}"
    kept = "a{x=1 active@m.1.mlp=0.1 active@m.2.mlp=0.2 active@m.3.mlp=0.3 ... 3 more at=*},b{y=2}"
    assert shortened(many) == kept


# ---------------------------------------------------------------------------- printing


KEYS = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,8}", fullmatch=True)
TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
VALUES = st.one_of(
    st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.booleans(), TEXT,
    st.text("0123456789.eE+-_x", max_size=6), st.text(string.punctuation + " \n", max_size=6),
)  # fmt: skip
PATTERNS = (
    st.lists(
        st.sampled_from(
            ["*", "[4-27]", "[0,2,5-]", "model.layers.", ".mlp", "a b", "|x", "=", "'"]
        ),
        min_size=1,
        max_size=4,
    )
    .map("x".join)
    .filter(lambda p: bad_pattern(p) is None)
)
STAGES = st.builds(
    StageText,
    st.from_regex(r"[a-z][a-z0-9]{0,5}(-[a-z0-9]{1,4}){0,2}", fullmatch=True),
    st.dictionaries(KEYS.filter(lambda k: k not in ("at", "skip")), VALUES, max_size=4),
    st.none() | PATTERNS,
    st.none() | PATTERNS,
    st.lists(
        st.tuples(KEYS.filter(lambda k: k not in ("at", "skip")), PATTERNS, VALUES),
        max_size=2,
        unique_by=lambda local: local[:2],
    ).map(tuple),
)


@given(st.lists(STAGES, min_size=1, max_size=4).map(tuple))
def test_parse_inverts_unparse(stages: tuple[StageText, ...]) -> None:
    text = unparse(stages)
    again = parse(text)
    assert again == stages
    assert [{k: type(v) for k, v in s.options.items()} for s in again] == [
        {k: type(v) for k, v in s.options.items()} for s in stages
    ]
    assert unparse(again) == text


@given(st.text(string.ascii_letters + string.digits + "{}=,@'\"#[]*-. \n\\", max_size=40))
def test_any_text_parses_or_says_why(text: str) -> None:
    try:
        stages = parse(text)
    except SparsifyError:  # any other exception fails the test
        return
    assert parse(unparse(stages)) == stages


def test_infinity_has_no_text() -> None:
    with pytest.raises(ValueError, match="cannot hold inf"):
        str(StageText("p", {"x": float("inf")}))


# ---------------------------------------------------------------------------- pointing


@pytest.mark.parametrize(
    ("text", "message", "carets"),
    [
        ("p{a@x=1 a@x=2}", "option 'a@x' is given twice", "        ^^^^^"),
        ("p{a@=1}", "option 'a' needs a path pattern after '@'", "   ^"),
        ("p{a@[=1}", "option 'a' needs a path pattern after '@'", "   ^"),
        ("p{a@[x]=1}", "'[x]' is not a path pattern", "   ^^^^"),
        ("p{a@x.*}", "option 'a' has no value", "  ^^^^^"),
        ("p{at@x=y}", "'at' names the regions of the whole stage", "    ^^"),
        ("ffn-moe{experts=8", "this '{' is never closed", "       ^"),
        ("ffn-moe,", "a pass name is expected here", "        ^"),
        (",a", "a pass name is expected here, not ','", "^"),
        ("a b", "expected ',' or the end, not 'b'", "  ^"),
        ("a}", "expected ',' or the end, not '}'", " ^"),
        ("a=3", "expected ',' or the end, not '='", " ^"),
        ("a{b}", "option 'b' has no value", "  ^"),
        ("a{b=}", "option 'b' needs a value, not '}'", "    ^"),
        ("a{b=", "option 'b' needs a value", "    ^"),
        ("a{=1}", "an option of a is expected here, not '='", "  ^"),
        ("a{bb=1 bb=2}", "option 'bb' is given twice", "       ^^^^"),
        ("a{b='x}", "this quote is never closed", "    ^"),
        (r'a{b="\q"}', "unknown escape in this text", "    ^^^^"),
        ("a{b=x[y}", "'[' cannot stand in this value", "     ^"),
        ("a{b=1e999}", "option 'b': 1e999 is too large", "    ^^^^^"),
        ("a{at=m.[5-2]}", "'at' is not a path pattern: the range '[5-2]' is empty", "     ^^^^^^^"),
        ("a{at=m.[x]}", "'[x]' is not a range of numbers", "     ^^^^^"),
        ("a{at=m.|}", "'at' is not a path pattern: an alternative is empty", "     ^^^"),
        ('a{at="m]"}', "'at' is not a path pattern: ']' has no partner", "     ^^^^"),
        ('a{x="日本" y=}', "option 'y' needs a value", " " * 13 + "^"),
    ],
)
def test_carets(text: str, message: str, carets: str) -> None:
    first, drawn, marks, *_ = fault(text).splitlines()
    assert message in first
    assert (drawn, marks) == (f"  {text}", f"  {carets}")


def test_long_lines_keep_the_caret_in_sight() -> None:
    text = ",".join(f"pass-{i}{{experts=8}}" for i in range(40)).replace("pass-30{", "pass-30{{")
    _, drawn, marks, *_ = fault(text).splitlines()
    assert len(drawn) <= 100
    assert drawn[marks.index("^") - 8 : marks.index("^") + 1] == "pass-30{{"


def test_an_empty_pipeline() -> None:
    assert "the pipeline is empty" in fault(" # nothing\n")


def test_a_stage_made_by_a_program_draws_itself() -> None:
    stage = StageText("p", {"x": 1, "abc": 2})
    assert stage.caret("abc=") == "p{x=1 abc=2}\n      ^^^"
    assert stage.caret() == "p{x=1 abc=2}\n^"


def test_source_names_the_line_of_a_file() -> None:
    drawing = Source("a\n  b{c}\n", Path("r.txt")).caret((6, 7))
    assert drawing == "r.txt:2\n  b{c}\n    ^"


# ---------------------------------------------------------------------------- recipe files


def test_recipe_files_nest_and_are_relative_to_each_other(tmp_path: Path) -> None:
    folder = tmp_path / "sub"
    folder.mkdir()
    (folder / "inner.txt").write_text("attn-moh{active=0.5}\n")
    (folder / "outer.txt").write_text("# both\nffn-moe{experts=8}\n@inner.txt\n")
    stages = parse(f"@{folder}/outer.txt,last")
    assert unparse(stages) == "ffn-moe{experts=8},attn-moh{active=0.5},last"


def test_faults_in_a_recipe_name_the_file_and_line(tmp_path: Path) -> None:
    recipe = tmp_path / "r.txt"
    recipe.write_text(
        textwrap.dedent("""\
        ffn-moe{
          experts=8
        attn-moh{active=}
    """)
    )
    assert f"{recipe}:3\n  attn-moh{{active=}}" in fault(f"@{recipe}")
    recipe.write_text("ffn-moe{experts=8 act")
    assert "option 'act' has no value" in fault(f"@{recipe}")


def test_recipe_files_that_cannot_be_read(tmp_path: Path) -> None:
    missing = fault(f"a,@{tmp_path}/no.txt", BadInput)
    assert "cannot read recipe file" in missing
    assert "No such file" in missing
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    assert "is not text" in fault(f"@{tmp_path}/binary", BadInput)
    (tmp_path / "loop.txt").write_text("@loop.txt")
    assert "includes itself" in fault(f"@{tmp_path}/loop.txt")
    assert "a file name is expected after '@'" in fault("@")


# ---------------------------------------------------------------------------- path patterns


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("a.b", "a.b", True),
        ("a.b", "a.b.c", False),
        ("*", "", True),
        ("*.mlp", "model.layers.0.mlp", True),
        ("model.layers.[4-27].mlp", "model.layers.4.mlp", True),
        ("model.layers.[4-27].mlp", "model.layers.27.mlp", True),
        ("model.layers.[4-27].mlp", "model.layers.28.mlp", False),
        ("h.[1-2]", "h.12", False),
        ("h.1[2-3]", "h.12", False),
        ("h.[0,2,5-]", "h.2", True),
        ("h.[0,2,5-]", "h.3", False),
        ("h.[0,2,5-]", "h.99", True),
        ("h.[-3]*", "h.3.mlp", True),
        ("h.[3]", "h.x", False),
        ("*[2]*", "a.1.b.2.c", True),
        ("a|b.*", "b.c", True),
        ("a|b.*", "ab.c", False),
        ("a+b.c", "a+b.c", True),
        ("*a*a*a*a*a*a*a*a*b", "a" * 200, False),
    ],
)
def test_match_path(pattern: str, path: str, expected: bool) -> None:
    assert match_path(pattern, path) is expected


def test_at_and_skip_together() -> None:
    (stage,) = parse("p{at=*.mlp skip=*.[0-1].*}")
    paths = [f"layers.{i}.{part}" for i in range(4) for part in ("mlp", "attn")]
    assert [p for p in paths if stage.selects(p)] == ["layers.2.mlp", "layers.3.mlp"]
