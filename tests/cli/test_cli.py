"""The command line: its verbs on a stand-in for the compiler, and its manners in real processes."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import sparsify
from sparsify.cli import main
from sparsify.cli.progress import bars
from sparsify.errors import ClaimFailed, NothingMatched

ROOT = Path(__file__).parents[2]
VERBS = (
    "inspect", "compile", "diff", "verify", "bisect", "reproduce", "eval", "generate", "demo",
    "export", "bench", "search", "heal", "passes", "env",
)  # fmt: skip


def process(*args: str, **options: Any) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})}
    return subprocess.run(
        [sys.executable, "-m", "sparsify_fx", *args],
        capture_output=True, text=True, env=env, check=False, timeout=120, **options,
    )  # fmt: skip


# ---------------------------------------------------------------------------- without torch


def test_help_passes_and_usage_errors_load_no_torch() -> None:
    commands: list[list[str]] = [
        ["--help"], ["--version"], ["passes"], ["passes", "ffn-moe"], ["passes", "--json"], ["env"],
        [], ["compil"], ["compile"], ["compile", "--outpt"], ["passes", "nope"],
        ["compile", "zoo:llama", "-o", "x", "-p", "ffn-meo"],
        ["compile", "zoo:llama", "-o", "x", "-p", "ffn-moe{experts=-8}"],
        ["verify", "not-there"], ["eval", "not-there", "--text", "not-there"],
        *([verb, "--help"] for verb in VERBS),
    ]  # fmt: skip
    code = (
        "import sys, json\nfrom sparsify.cli import main\n"
        "codes = [main(c) for c in json.loads(sys.argv[1])]\n"
        "heavy = {'torch', 'numpy', 'transformers', 'rich'} & set(sys.modules)\n"
        "print(json.dumps([codes, sorted(heavy)]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(commands)],
        capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    codes, heavy = json.loads(done.stdout.splitlines()[-1])
    assert heavy == []
    assert codes == [0] * 6 + [2] * 9 + [0] * len(VERBS)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("args", [("--help",), ("passes",), ("compile",)])
def test_quick_answers_load_nothing_heavy(args: tuple[str, ...]) -> None:
    """What makes them quick (0.2 s): torch alone takes two seconds to load."""
    program = (
        "import contextlib, sys, sparsify_fx\n"
        f"sys.argv = ['sparsify', *{args!r}]\n"
        "with contextlib.suppress(SystemExit):\n"
        "    sparsify_fx.main()\n"
        "heavy = {'torch', 'numpy', 'transformers', 'networkx', 'pydantic'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], text=True, capture_output=True, timeout=60, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for verb in VERBS:
        assert f"\n  {verb} " in out
    assert "Exit codes: 0 done, 1 a claim failed" in out
    assert "..." not in out.partition("Commands:")[2]  # no summary is cut off at 80 columns


def test_nothing_at_all_shows_help_and_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "Commands:" in capsys.readouterr().out


# ---------------------------------------------------------------------------- about


def test_passes_lists_and_explains(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["passes"]) == 0
    out = capsys.readouterr().out
    assert "ffn-moe" in out
    assert "FeedForward" in out
    assert main(["passes", "ffn-moe"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("ffn-moe: ")
    assert "works on FeedForward" in out
    assert "\nexperts " in out
    assert "\nskip " in out
    assert main(["passes", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert {"ffn-moe", "attn-moh"} <= {p["name"] for p in listed}
    assert all(p["summary"] and p["owner"] for p in listed)


def test_env_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["sparsify"] == sparsify.__version__
    assert found["packages"]["torch"]


# ---------------------------------------------------------------------------- verbs on a stand-in


class Found:
    """What a function of the api returns: a text, a dict, and whether all is well."""

    def __init__(self, name: str = "found", *, ok: bool = True) -> None:
        self.name, self.ok, self.report = name, ok, self
        self.steps = [types.SimpleNamespace(count=lambda kind: 1, remarks=())]

    def text(self, width: int = 100) -> str:
        return f"{self.name} in {width} columns"

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "odd": float("nan")}

    def save(self, path: Path, *, force: bool = False) -> None:
        Path(path).mkdir()


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[types.SimpleNamespace]:
    """A stand-in for sparsify.api that keeps its calls; the test runs in an empty folder."""
    stand_in = types.SimpleNamespace(calls=[])

    def function(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Found:
            kwargs.pop("progress", None)
            stand_in.calls.append((name, args, kwargs))
            return Found(name)

        return call

    for name in (
        "inspect",
        "compile",
        "diff",
        "verify",
        "bisect",
        "reproduce",
        "evaluate",
        "bench",
    ):
        setattr(stand_in, name, function(name))
    monkeypatch.setitem(sys.modules, "sparsify.api", stand_in)  # type: ignore[arg-type]
    monkeypatch.setattr(sparsify, "api", stand_in, raising=False)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.chdir(tmp_path)
    return stand_in


def test_compile_hands_on_what_it_was_given(
    api: types.SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("some words")
    args = ["compile", "zoo:llama", "-p", "ffn-moe{experts=8}", "-o", "out", "--active", "0.5"]
    args += ["--calibration", "text.txt", "--verify", "end", "--seed", "7", "--json", "r.json"]
    assert main(args) == 0
    (name, positional, options) = api.calls[0]
    assert (name, positional) == (
        "compile", ("zoo:llama", "ffn-moe{experts=8}", None),
    )  # fmt: skip

    assert options == {
        "calibration": "text.txt", "active": 0.5, "verify": "end", "seed": 7, "dtype": None,
        "on_step": None,
    }  # fmt: skip
    out = capsys.readouterr().out
    assert "compile in 100 columns" in out
    assert "saved out" in out
    assert json.loads((tmp_path / "r.json").read_text()) == {"name": "compile", "odd": None}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "r.json", "text.txt"]


def test_json_on_stdout_is_json_only(
    api: types.SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compile", "m", "-o", "out", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "compile"
    for verb in (["inspect", "m"], ["diff", "a", "b"], ["bisect", "m", "-p", "ffn-moe"]):
        assert main([*verb, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["name"] == verb[0]


def test_bench_hands_on_what_it_was_given(
    api: types.SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["bench", "zoo:llama", "-p", "ffn-moe", "--active", "1,0.5", "--tokens", "1,64"]
    args += ["--context", "16", "--rounds", "3", "--compile", "--json", "b.json"]
    assert main(args) == 0
    assert api.calls == [
        ("bench", ("zoo:llama", "ffn-moe"), {
            "active": (1.0, 0.5), "tokens": (1, 64), "context": 16, "rounds": 3, "dense": None,
            "compiled": True, "example": None, "calibration": None, "seed": 0,
        }),
    ]  # fmt: skip
    assert json.loads((tmp_path / "b.json").read_text())["name"] == "bench"
    assert "bench in 100 columns" in capsys.readouterr().out
    assert main(["bench", "zoo:llama", "-p", "ffn-moe", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "bench"


def test_a_failed_verification_is_exit_1(
    api: types.SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sparsify.json").write_text("{}")
    assert main(["verify", "out"]) == 0
    monkeypatch.setattr(api, "verify", lambda *_: Found(ok=False))
    assert main(["verify", "out"]) == 1


@pytest.mark.parametrize(
    ("error", "code", "shown"),
    [
        (NothingMatched("no region", where="near miss: x"), 3, "error: no region   [nothing"),
        (ClaimFailed("does not keep"), 1, "error: does not keep   [claim failed]"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError("no room"), 2, "error: out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "error: out of memory"),
        (OSError(28, "No space left on device", "w.bin"), 2, "error: cannot write: No space left"),
    ],
)
def test_every_end_has_its_code_and_one_message(
    api: types.SimpleNamespace,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    shown: str,
) -> None:
    def raises(*_: Any, **__: Any) -> None:
        raise error

    api.inspect = raises
    assert main(["inspect", "m"]) == code
    err = capsys.readouterr().err
    assert err.lstrip("\n").startswith(shown)
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_a_bug_of_ours_leaves_a_folder_that_reproduces_it(
    api: types.SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def raises(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("by nought")

    api.inspect = raises
    assert main(["inspect", "a model"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ZeroDivisionError: by nought   [bug in sparsify]")
    assert "Traceback" not in err
    (folder,) = tmp_path.iterdir()
    assert folder.name.startswith("sparsify-bug-")
    assert folder.name in err
    assert (folder / "command.txt").read_text() == "sparsify inspect 'a model'\n"
    assert "ZeroDivisionError: by nought" in (folder / "traceback.txt").read_text()
    assert json.loads((folder / "versions.json").read_text())["sparsify"] == sparsify.__version__
    assert main(["reproduce", folder.name]) == 1  # the same bug again
    assert "by nought" in capsys.readouterr().err
    assert len(list(tmp_path.iterdir())) == 1


def test_warnings_are_one_line(
    api: types.SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    before = warnings.formatwarning

    def warns(*_: Any, **__: Any) -> Found:
        print(warnings.formatwarning("the slow way", UserWarning, "x.py", 1), file=sys.stderr)
        return Found()

    api.inspect = warns
    assert main(["inspect", "m"]) == 0
    assert capsys.readouterr().err == "warning: the slow way\n\n"
    assert warnings.formatwarning is before


# ---------------------------------------------------------------------------- manners


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("columns", ["24", "50", "120"])
def test_progress_fits_the_terminal(monkeypatch: pytest.MonkeyPatch, columns: str) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with bars() as progress:
        assert progress is not None
        for done in range(4):
            progress("ffn-moe", done, 3)
        progress("unknown length", 1, 0)
    shown = screen.getvalue()
    assert "ffn-moe"[:3] in shown
    assert "\x1b[3" not in shown  # no colour
    lines = shown.replace("\r", "\n").split("\n")
    plain = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line) for line in lines]
    assert max(map(len, plain)) <= int(columns)


def test_no_progress_in_a_pipe_or_a_dumb_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with bars() as progress:
        assert progress is None
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "dumb")
    with bars() as progress:
        assert progress is None
    monkeypatch.setenv("TERM", "xterm")
    with bars(quiet=True) as progress:
        assert progress is None


@pytest.mark.parametrize(("no_color", "coloured"), [("", True), ("1", False)])
def test_errors_are_coloured_on_a_terminal_only(
    monkeypatch: pytest.MonkeyPatch, no_color: str, coloured: bool
) -> None:
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setenv("TERM", "xterm")
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    assert main(["passes", "ffn-meo"]) == 2
    assert ("\x1b[" in screen.getvalue()) is coloured


@pytest.mark.parametrize("columns", ["40", "200"])
def test_tables_fit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], columns: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert main(["passes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= max(int(columns), 60)


def test_a_closed_pipe_is_quiet() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "sparsify_fx", "passes", "--json"],
        stdout=writer, stderr=subprocess.PIPE, text=True, env=env, check=False,
    )  # fmt: skip
    os.close(writer)
    assert done.returncode == 141
    assert done.stderr == ""


def test_ctrl_c_is_one_word(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(  # a job in the background may have been told to ignore it
        "import os, signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
    )
    code = (
        "import sys, types, sparsify\n"
        "def inspect(*a, **k): import slow\n"
        "sys.modules['sparsify.api'] = types.SimpleNamespace(inspect=inspect)\n"
        "from sparsify.cli import main; sys.exit(main(['inspect', 'm']))\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(tmp_path)))}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 130
    assert done.stderr.strip() == "interrupted"


# ---------------------------------------------------------------------------- for real


def test_a_model_without_an_example_takes_one_from_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole way on a model of six lines: compile, verify, compare, look at the graph."""
    import torch
    from safetensors.torch import save_file

    (tmp_path / "six_lines.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Mlp(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 8)\n"
        "    def forward(self, x):\n"
        "        return x + self.down(torch.relu(self.up(x)))\n"
    )
    save_file({"x": torch.randn(2, 3, 8)}, tmp_path / "x.safetensors")
    monkeypatch.chdir(tmp_path)
    command = ["compile", "six_lines:Mlp", "-p", "ffn-moe{experts=4}", "--example", "x.safetensors"]
    command += [
        "-o",
        "out",
        "--json",
        "r.json",
        "--emit-graph",
        "g",
        "--print-after",
        "change",
        "-q",
    ]
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert "1 of 1 regions changed" in out
    assert "# after ffn-moe{experts=4}: 4 -> 2 operations, 1 region rewritten" in err
    assert (tmp_path / "g" / "01-ffn-moe.py").read_text().strip() in err
    assert main(["verify", "out"]) == 0
    assert main(["diff", "out", "r.json"]) == 0
    assert "no difference" in capsys.readouterr().out
    assert main([*command, "--force"]) == 0
    assert main(["bisect", *command[1:6], "--json"]) == 0


# ---------------------------------------------------------------------------- goldens


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_is_as_accepted(
    verb: str,
    golden: Callable[[str, str], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main([verb, "--help"] if verb else ["--help"]) == 0
    golden(f"cli/help-{verb or 'sparsify'}.txt", capsys.readouterr().out)
