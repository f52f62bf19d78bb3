"""Every code block of the README runs, and shows what it really prints.

``python`` blocks run one after the other in one namespace; a ``text`` block behind one is its
output.
``console`` blocks: each ``$`` line runs in one temporary folder; what follows is its output. The
installed script runs the verbs of OWN_PROCESS, the others run in this process.
``sh`` blocks hold the make targets: they must exist. Figures that differ from machine to machine
are written as ``...`` in the README.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from sparsify.cli import main

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# Light ones, and one that reads what another process wrote: loading torch takes four seconds each.
OWN_PROCESS = ("passes", "verify")
BLOCKS = [(m[1], m[2]) for m in re.finditer(r"```(\w*)\n(.*?)```", README, flags=re.S)]


def matches(shown: str, real: str) -> bool:
    """``...`` stands for anything within a line, a line of only ``...`` for any lines."""
    lines = [line.rstrip() for line in shown.strip("\n").splitlines()]
    pattern = []
    for line in lines:
        if line.strip() == "...":
            pattern.append(r"(?:.*\n)*?")
        else:
            pattern.append(".*".join(re.escape(part) for part in line.split("...")) + r"[ ]*\n")
    return re.fullmatch("".join(pattern), real.strip("\n") + "\n") is not None


def test_blocks_are_known() -> None:
    assert BLOCKS
    assert {kind for kind, _ in BLOCKS} <= {"python", "text", "console", "sh"}


def test_python_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "readme"}
    for at, (kind, code) in enumerate(BLOCKS):
        if kind != "python":
            continue
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(code, f"README block {at}", "exec", dont_inherit=True), namespace)
        following = BLOCKS[at + 1] if at + 1 < len(BLOCKS) else ("", "")
        if following[0] == "text":
            assert matches(following[1], out.getvalue()), out.getvalue()


def test_console_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    for name, value in {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}.items():
        monkeypatch.setenv(name, value)
    processes = 0
    for kind, text in BLOCKS:
        if kind != "console":
            continue
        for part in re.split(r"^\$ ", text, flags=re.M)[1:]:
            command, _, shown = part.partition("\n")
            script, verb, *rest = shlex.split(command)
            assert script == "sparsify"
            if verb in OWN_PROCESS:
                processes += 1
                ran = subprocess.run(
                    [script, verb, *rest], text=True, capture_output=True, timeout=300, check=False
                )
                code, out, err = ran.returncode, ran.stdout, ran.stderr
            else:
                code = main([verb, *rest])
                out, err = capsys.readouterr()
            assert code == 0, f"{command}\n{err}"
            assert matches(shown, out), f"{command}\n{out}"
    assert processes >= len(OWN_PROCESS)


def test_make_targets() -> None:
    for kind, text in BLOCKS:
        if kind != "sh":
            continue
        for line in text.splitlines():
            if line.startswith("make "):
                ran = subprocess.run(
                    ["make", "-n", line.split()[1]], cwd=ROOT, capture_output=True, check=False
                )
                assert ran.returncode == 0, line
