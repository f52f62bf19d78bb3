"""Bad inputs, one row each: one clear message, the right exit code, nothing half-written.

Every row runs the whole command line in this process; the last tests start their own.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sparsify.cli import main

ROOT = Path(__file__).parents[2]

USER_MODULE = """
import torch
from torch import nn

class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 22), nn.Linear(22, 8)
    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))

class Branches(Mlp):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else x

def good(): return Mlp(), (torch.ones(2, 3, 8),)
def branches(): return Branches(), (torch.ones(2, 3, 8),)
def no_example(): return Mlp()
def raises(): raise ValueError("the weights are elsewhere")
def number(): return 3
def linear(): return nn.Linear(4, 4), (torch.ones(2, 4),)
def not_a_number():
    model = Mlp()
    model.up.weight.data[3, 4] = float("nan")
    return model, (torch.ones(2, 3, 8),)
"""


@dataclasses.dataclass(frozen=True)
class Row:
    """One bad input: the command, the exit code, and what the message has to say."""

    name: str
    command: str
    says: tuple[str, ...]
    code: int = 2
    prepare: Callable[[Path], None] | None = None


# ---------------------------------------------------------------------------- preparing a folder


def write(name: str, content: str | bytes) -> Callable[[Path], None]:
    """Puts one file into the test's folder."""

    def prepare(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return prepare


def both(*steps: Callable[[Path], None]) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        for step in steps:
            step(folder)

    return prepare


def llama(folder: Path) -> None:
    """A tiny Hugging Face folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "llama")


def cut_weights(folder: Path) -> None:
    """The same with half of its weights file."""
    llama(folder)
    file = folder / "llama" / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def pickled(folder: Path) -> None:
    import torch

    torch.save({"weight": torch.ones(2)}, folder / "model.pt")


def saved(folder: Path) -> None:
    """A saved sparse model."""
    write("own.py", USER_MODULE)(folder)
    assert main(["compile", "own:good", "-p", "ffn-moe{experts=2}", "-o", "saved", "-q"]) == 0


def from_the_future(folder: Path) -> None:
    saved(folder)
    file = folder / "saved" / "sparsify.json"
    manifest = json.loads(file.read_text())
    manifest["format"] = 999
    file.write_text(json.dumps(manifest))


def without_weights(folder: Path) -> None:
    saved(folder)
    (folder / "saved" / "sparsify.safetensors").unlink()


def damaged_weights(folder: Path) -> None:
    saved(folder)
    file = folder / "saved" / "sparsify.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def damaged_manifest(folder: Path) -> None:
    saved(folder)
    file = folder / "saved" / "sparsify.json"
    file.write_text(file.read_text()[:500])


def clashing(folder: Path) -> None:
    """Another distribution that registers a pass called ffn-moe."""
    info = folder / "acme_passes-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-passes\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[sparsify.passes]\nffn-moe = acme.moe\n")


OWN = write("own.py", USER_MODULE)
GOOD = "compile own:good -o out -p ffn-moe{experts=2}"
TEXT = write("text.txt", "some words to go by\n" * 20)

# ---------------------------------------------------------------------------- the table


PIPELINES = (
    Row("unknown pass", "compile own:good -o out -p ffn-meo{experts=8}",
        ("no pass named 'ffn-meo'", "  ^^^^^^^\n", "did you mean 'ffn-moe'?")),
    Row("unknown option", "compile own:good -o out -p ffn-moe{expert=8}",
        ("ffn-moe has no option 'expert'", "          ^^^^^^\n", "did you mean 'experts'?")),
    Row("wrong type", "compile own:good -o out -p ffn-moe{experts=many}",
        ("takes int, not 'many'", "                  ^^^^\n")),
    Row("out of range", "compile own:good -o out -p ffn-moe{active=1.5}",
        ("cannot be 1.5", "active must be > 0 and <= 1")),
    Row("no such choice", "compile own:good -o out -p ffn-moe{split=clutser}",
        ("cannot be 'clutser'", "did you mean 'cluster'?")),
    Row("grammar", "compile own:good -o out -p ffn-moe{experts=8",
        ("this '{' is never closed", "         ^\n")),
    Row("empty pipeline", "compile own:good -o out -p |", ("a pass name is expected here",)),
    Row("missing recipe", "compile own:good -o out -p @recipe.txt",
        ("cannot read recipe file recipe.txt", "No such file")),
    Row("truncated recipe", "compile own:good -o out -p @recipe.txt",
        ("this '{' is never closed", "recipe.txt:2", "  attn-moh{active=0.5\n          ^"),
        prepare=write("recipe.txt", "ffn-moe{experts=2},\nattn-moh{active=0.5\n")),
    Row("recipe is binary", "compile own:good -o out -p @recipe.txt",
        ("recipe file recipe.txt is not text",), prepare=write("recipe.txt", b"\xff\xfe\x00")),
    Row("two owners of a pass", GOOD,
        ("two packages register a pass named 'ffn-moe'", "acme-passes", "sparsify-fx"),
        prepare=both(OWN, clashing)),
    Row("indivisible", "compile own:good -o out -p ffn-moe{experts=5}",
        ("ffn-moe", "22", "5 experts", "help:"), 3, OWN),
    Row("nothing matched", "compile own:linear -o out -p ffn-moe", ("[nothing matched]",), 3, OWN),
    Row("nothing selected", "compile own:good -o out -p ffn-moe{experts=2,at=nowhere.*}",
        ("ffn-moe", "at="), 3, OWN),
)  # fmt: skip

VALUES = (
    Row("no active unit", f"{GOOD} --active 0", ("--active cannot be 0", "0 < --active <= 1")),
    Row("active is not a number", f"{GOOD} --active nan", ("--active cannot be nan",)),
    Row("active is a word", f"{GOOD} --active half", ("invalid value for '--active'",)),
    Row("unknown dtype", f"{GOOD} --dtype float33", ("cannot be 'float33'", "'float32'")),
    Row("unknown verify", f"{GOOD} --verify eahc", ("cannot be 'eahc'", "did you mean 'each'?")),
    Row("unknown verb", "compil own:good", ("no such command 'compil'", "mean 'compile'?")),
    Row("unknown flag", f"{GOOD} --forse", ("no such option", "--force")),
    Row("no model", "compile", ("missing argument 'MODEL'",)),
    Row("no output", "compile own:good", ("missing option '--output'",)),
    Row("budgets", "eval saved --text text.txt --active 1,x", ("'1,x'",), prepare=TEXT),
    Row("eval of nothing", "eval saved", ("there is nothing to measure on", "--choices FILE")),
    Row("eval: no questions", "eval saved --choices q.jsonl", ("--choices q.jsonl is not there",)),
    Row("eval: a broken question", "eval saved --choices q.jsonl",
        ("q.jsonl holds a line that is no question", "line 1: 'answer' is missing"),
        prepare=write("q.jsonl", '{"question": "Why?", "choices": ["a", "b"]}')),
    Row("eval: baseline", "eval saved --text docstrings --baselines teel", ("mean 'teal'?",)),
    Row("eval: pooling", "eval saved --text docstrings --pooling max", ("did you mean 'mean'?",)),
    Row("no such pass", "eval saved --text docstrings --pass ffn-meo", ("mean 'ffn-moe'?",)),
    Row("no tokens", "generate saved hello --tokens 0", ("--tokens cannot be 0",)),
    Row("cold", "generate saved hello --temperature -1", ("--temperature cannot be -1",)),
)  # fmt: skip

FILES = (
    Row("missing calibration", f"{GOOD} --calibration no.txt",
        ("no such text file: no.txt", "built-in text: docstrings")),
    Row("calibration is a folder", f"{GOOD} --calibration .", ("is a folder",)),
    Row("calibration is empty", f"{GOOD} --calibration t.txt", ("t.txt is empty",),
        prepare=write("t.txt", " \n\n")),
    Row("calibration is binary", f"{GOOD} --calibration t.txt", ("t.txt is not text",),
        prepare=write("t.txt", b"PK\x03\x04\x00\x00")),
    Row("calibration is latin-1", f"{GOOD} --calibration t.txt",
        ("t.txt is not UTF-8", "line 1", "iconv"),
        prepare=write("t.txt", "caf\xe9 ".encode("latin-1") * 9)),
    Row("calibration without tokenizer", f"{GOOD} --calibration text.txt", ("tokenizer",),
        prepare=both(OWN, TEXT)),
    Row("no example file", f"{GOOD} --example x.safetensors", ("x.safetensors is not there",)),
    Row("example is no safetensors", f"{GOOD} --example text.txt",
        ("--example text.txt is not a readable safetensors file",), prepare=TEXT),
    Row("output exists", GOOD, ("out exists already", "--force replaces it"),
        prepare=write("out/sparsify.json", "{}")),
    Row("output is somebody's folder", f"{GOOD} --force", ("is not a saved sparse model",),
        prepare=write("out/thesis.tex", "precious")),
    Row("output is a file", f"{GOOD} --force", ("out is a file",), prepare=write("out", "x")),
    Row("output under a file", "compile own:good -o file/out -p ffn-moe",
        ("cannot write file/out", "is not a folder"), prepare=write("file", "x")),
    Row("output in a system folder", "compile own:good -o /proc/out -p ffn-moe",
        ("cannot write /proc/out",), prepare=OWN),
    Row("report exists", f"{GOOD} --json r.json", ("--json r.json exists already",),
        prepare=write("r.json", "{}")),
    Row("report of nothing", "diff a.json b.json", ("a.json",)),
    Row("diff of no reports", "diff a.json a.json", ("a.json",), prepare=write("a.json", "[1]")),
    Row("nothing to reproduce", "reproduce nowhere", ("no folder nowhere",)),
    Row("reproduce an odd folder", "reproduce odd", ("odd",), prepare=write("odd/x", "")),
)  # fmt: skip

MODELS = (
    Row("missing path", "inspect ./no/such/model", ("no/such/model",)),
    Row("empty folder", "inspect empty", ("empty holds no model",), prepare=write("empty/x", "")),
    Row("unknown zoo name", "inspect zoo:lama", ("lama", "did you mean 'llama'?")),
    Row("unknown hub id", "inspect nobody/no-such-model", ("nobody/no-such-model",)),
    Row("corrupt safetensors", "inspect llama", ("llama", "safetensors"), prepare=cut_weights),
    Row("bad config", "inspect llama", ("llama",), prepare=write("llama/config.json", "{")),
    Row("a pickle", "inspect model.pt", ("model.pt is a pickle", "can run any code"),
        prepare=pickled),
    Row("truncated gguf", "inspect m.gguf", ("m.gguf",), prepare=write("m.gguf", b"GGUF\x03")),
    Row("some other file", "inspect text.txt", ("text.txt",), prepare=TEXT),
    Row("no module", "inspect owm:good", ("no module named 'owm'",)),
    Row("no function", "inspect own:goood", ("no function 'goood'", "'good'"), prepare=OWN),
    Row("function raises", "inspect own:raises",
        ("own:raises failed", "ValueError: the weights are elsewhere", "own.py:"), prepare=OWN),
    Row("function returns a number", "inspect own:number", ("own:number", "int"), prepare=OWN),
    Row("module does not parse", "inspect own:good", ("own:good cannot be imported", "own.py:1"),
        prepare=write("own.py", "def (")),
    Row("no example", "inspect own:no_example", ("example",), prepare=OWN),
    Row("data-dependent branch", "inspect own:branches", ("[capture]", "own.py:"), prepare=OWN),
    Row("weights with NaN", "inspect own:not_a_number", ("NaN", "up.weight"), prepare=OWN),
)  # fmt: skip

SAVED = (
    Row("nothing saved", "verify nowhere", ("no saved model at nowhere",)),
    Row("heal: no model", "heal nothing --text docstrings -o out", ("no saved model at nothing",)),
    Row("heal: no text", "heal saved --text x.txt -o out", ("x.txt",), prepare=saved),
    Row("heal: what", "heal saved --text docstrings -o out --train router", ("mean 'routers'?",)),
    Row("heal: steps", "heal saved --text docstrings -o out --steps 0", ("at least 1",)),
    Row("heal: batch", "heal saved --text docstrings -o out --batch 0", ("at least 1",)),
    Row("heal: rate", "heal saved --text docstrings -o out --rate 0", ("--rate cannot be 0",)),
    Row("heal: minutes", "heal saved --text docstrings -o out --minutes nan", ("--minutes",)),
    Row("heal: budget", "heal saved --text docstrings -o out --active 2", ("--active cannot be",)),
    Row("heal: schedule", "heal saved --text docstrings -o out --schedule cubik",
        ("mean 'cubic'?",)),
    Row("heal: start", "heal saved --text docstrings -o out --start 0", ("--start cannot be",)),
    Row("heal: ramp", "heal saved --text docstrings -o out --ramp 2", ("--ramp cannot be",)),
    Row("heal: taken", "heal saved --text docstrings -o saved", ("saved exists already",),
        prepare=saved),
    Row("heal: nothing to resume", "heal saved --text docstrings -o out --resume",
        ("no checkpoint in out.healing",), prepare=saved),
    Row("heal: no language model", "heal saved --text docstrings -o out", ("language models",),
        prepare=saved),
    Row("not a saved model", "verify text.txt", ("is not a saved sparse model",), prepare=TEXT),
    Row("from the future", "verify saved", ("999",), prepare=from_the_future),
    Row("weights are gone", "verify saved", ("sparsify.safetensors",), prepare=without_weights),
    Row("weights are damaged", "verify saved", ("saved",), prepare=damaged_weights),
    Row("manifest is cut", "verify saved", ("sparsify.json",), prepare=damaged_manifest),
    Row("not a language model", "generate saved hello", ("tokenizer",), prepare=saved),
    Row("eval of no language model", "eval saved --text text.txt", ("language models",),
        prepare=both(saved, TEXT)),
)  # fmt: skip

BENCH = (
    Row("bench: budgets", "bench own:good -p ffn-moe --active 1,x", ("'1,x'",)),
    Row("bench: no budget", "bench own:good -p ffn-moe --active 0", ("--active cannot be 0",)),
    Row("bench: tokens", "bench own:good -p ffn-moe --tokens 1,2.5",
        ("--tokens takes counts such as 1,8,64, not '1,2.5'",)),
    Row("bench: no tokens", "bench own:good -p ffn-moe --tokens 8,0", ("--tokens cannot be 0",)),
    Row("bench: no context", "bench own:good -p ffn-moe --context 0", ("--context cannot be 0",)),
    Row("bench: no rounds", "bench own:good -p ffn-moe --rounds 0", ("--rounds cannot be 0",)),
    Row("bench: unknown pass", "bench own:good -p ffn-meo", ("did you mean 'ffn-moe'?",)),
    Row("bench: no pipeline", "bench own:good",
        ("own:good is a dense model: it needs a pipeline", "-p 'ffn-moe'")),
    Row("bench: missing model", "bench ./nowhere -p ffn-moe", ("nowhere",)),
    Row("bench: missing folder", "bench ./nowhere", ("./nowhere", "pipeline")),
    Row("bench: pipeline for a sparse model", "bench saved -p ffn-moe",
        ("saved is a sparse model: it takes no pipeline",), prepare=saved),
    Row("bench: calibration of a sparse model", "bench saved --calibration docstrings",
        ("--calibration is of no use",), prepare=saved),
    Row("bench: no such dense model", "bench saved --dense zoo:lama", ("mean 'llama'?",),
        prepare=saved),
    Row("bench: damaged model", "bench saved", ("saved",), prepare=damaged_weights),
    Row("bench: table exists", "bench own:good -p ffn-moe --json r.json",
        ("--json r.json exists already",), prepare=write("r.json", "{}")),
    Row("bench: nothing to route", "bench own:linear -p ffn-moe", ("[nothing matched]",), 3, OWN),
)  # fmt: skip

EXPORT = (
    Row("export: opset", "export saved a.onnx --opset 12",
        ("opset 12 cannot be written", "18 to 24")),
    Row("export: target", "export saved a.onnx --target potable", ("mean 'portable'?",)),
    Row("export: weights", "export saved a.onnx --weights in8", ("mean 'int8'?",)),
    Row("export: 4 bits", "export saved a.onnx --weights int4 --opset 20",
        ("opset 20 has no weights in 4 bits", "--opset 21")),
    Row("export: routing", "export saved a.onnx --routing x", ("one of: mask, branch, moe",)),
    Row("export: routing of a target", "export saved a.onnx --routing moe",
        ("'portable' has no routing 'moe'", "target='ort'")),
    Row("export: our operators in another target",
        "export saved a.onnx --target ort --routing custom",
        ("'ort' has no routing 'custom'", "target='ort-custom'")),
    Row("export: tokens", "export saved a.onnx --routing auto --tokens 0",
        ("--tokens cannot be 0", "at least 1")),
    Row("export: threads", "export saved a.onnx --routing auto --threads 0",
        ("--threads cannot be 0", "at least 1")),
    Row("export: threads that are not here", "export saved a.onnx --target ort --threads 9999",
        ("9999 threads cannot be timed here", "on the machine it is for")),
    Row("export: budget", "export saved a.onnx --active 2", ("--active cannot be 2",)),
    Row("export: no model", "export nowhere a.onnx", ("no saved model at nowhere",)),
    Row("export: a folder", "export saved own.py/a.onnx", ("own.py is not a folder",),
        prepare=saved),
    Row("export: folder taken", "export saved saved", ("saved is not empty",), prepare=saved),
    Row("export: folder of others", "export saved saved/ --force", ("holds no model.onnx",),
        prepare=saved),
    Row("export: no folder for it", "export saved none/served/", ("is not there",),
        prepare=saved),
    Row("export: file exists", "export saved a.onnx", ("exists already", "--force"),
        prepare=both(saved, write("a.onnx", "kept"))),
    Row("export: no such folder", "export saved none/a.onnx", ("the folder none is not there",),
        prepare=saved),
    Row("export: damaged model", "export saved a.onnx", ("saved",), prepare=damaged_weights),
)  # fmt: skip

ROWS = PIPELINES + VALUES + FILES + MODELS + SAVED + BENCH + EXPORT


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder to work in; modules imported from it are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    sys.modules.pop("own", None)
    yield tmp_path
    sys.modules.pop("own", None)


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b""
        for p in folder.rglob("*")
        if "__pycache__" not in p.parts
    }


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_bad_input(row: Row, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if row.prepare is not None:
        row.prepare(folder)
    capsys.readouterr()
    before = tree(folder)
    words = row.command.split()
    code = main([*words, "-q"] if words[0] in ("compile", "inspect") and len(words) > 1 else words)
    out, err = capsys.readouterr()
    assert code == row.code, err
    assert [line for line in err.splitlines() if line.startswith("error: ")] == err.splitlines()[:1]
    for words_said in row.says:
        assert words_said in err
    assert "Traceback" not in err
    assert out == ""
    assert tree(folder) == before


def test_there_are_enough_rows() -> None:
    assert len(ROWS) >= 20
    assert len({row.name for row in ROWS}) == len(ROWS)


# ---------------------------------------------------------------------------- export, its machine


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting takes root")
@pytest.mark.parametrize("output", ["small/a.onnx", "small/served/"])
def test_export_onto_a_full_disk(
    folder: Path, output: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A disk of one page, which is taken, for real."""
    saved(folder)
    (folder / "small").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", "small"]
    if subprocess.run(mount, cwd=folder, capture_output=True, check=False).returncode:
        pytest.skip("this machine mounts nothing")
    try:
        (folder / "small" / "page").write_bytes(b"x" * 4096)
        capsys.readouterr()
        code = main(["export", "saved", output])
        left = [path.name for path in (folder / "small").iterdir()]
    finally:
        subprocess.run(["umount", "small"], cwd=folder, check=True)
    out, err = capsys.readouterr()
    assert (code, out, left) == (2, "", ["page"])
    assert err.splitlines()[0].startswith(f"error: cannot write {output.rstrip('/')}")
    assert "No space left on device" in err and "Traceback" not in err


@pytest.mark.parametrize("absent", ["onnx", "onnx_ir", "onnxscript", "onnxruntime"])
def test_export_without_the_extra(
    absent: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(folder)
    capsys.readouterr()
    monkeypatch.setitem(sys.modules, absent, None)
    before = tree(folder)
    assert main(["export", "saved", "a.onnx"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: ONNX export needs {absent}, which is not installed")
    assert "pip install 'sparsify-fx[onnx]'" in err and "Traceback" not in err
    assert tree(folder) == before


# ---------------------------------------------------------------------------- in a process


def process(folder: Path, *args: str, path: str = "") -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), path)))}
    return subprocess.run(
        [sys.executable, "-m", "sparsify_fx", *args],
        cwd=folder, capture_output=True, text=True, env=env, check=False, timeout=120,
    )  # fmt: skip


def test_a_foreign_sparsify_package(tmp_path: Path) -> None:
    info = tmp_path / "site" / "sparsify-1.7.0.dist-info"
    info.mkdir(parents=True)
    (info / "RECORD").write_text("sparsify/__init__.py,,\n")
    done = process(tmp_path, "passes", path=str(tmp_path / "site"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: the import name 'sparsify' belongs to another installed")
    assert "pip uninstall -y sparsify" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_model_in_a_process(tmp_path: Path) -> None:
    done = process(tmp_path, "compile", "./nowhere", "-o", "out", "-p", "ffn-moe")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------- as text


def test_messages_are_as_accepted(
    folder: Path, golden: Callable[[str, str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """The messages of all rows that need no model, side by side: what users read when they slip."""
    shown = []
    for row in (*PIPELINES, *VALUES, *FILES, *BENCH[:8]):
        if row.prepare is None and not row.command.startswith("diff"):  # diff needs torch
            main(row.command.split())
            shown.append(f"$ sparsify {row.command}\n{capsys.readouterr().err}")
    golden("cli/errors.txt", "\n".join(shown))
