"""``sparsify search`` as it is typed, on a tiny model with a tokenizer of letters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import sparsify
from sparsify import zoo
from sparsify.cli import main

WORDS = "the quick brown fox jumps over a lazy dog, again and AGAIN. "


@pytest.fixture(scope="module")
def lettered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model folder, ``model``, and ``text.txt``."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("search")
    letters = {"?": 0, **{chr(32 + n): 1 + n for n in range(95)}}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(letters, unk_token="?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?")
    zoo.build("llama").model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "text.txt").write_text(WORDS * 170)
    return folder


def test_search_and_compile_what_it_found(
    lettered: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(lettered)
    words = (
        "search model --target flops=0.9 --calibration text.txt --tokens 256 --rounds 1 "
        "--points 1 -o recipe.txt --json found.json -q"
    )
    assert main(words.split()) == 0
    out = capsys.readouterr().out
    found = json.loads(Path("found.json").read_text())
    assert found["format"] == "sparsify-search"
    assert found["found"]["reached"] <= 0.901
    for said in ("<- found", "even", "dial", "front (flops", "-p @recipe.txt --calibration text"):
        assert said in out
    recipe = Path("recipe.txt").read_text()
    assert recipe.startswith("# sparsify search model --target flops=0.9: flops 0.")
    assert recipe.endswith(found["found"]["pipeline"] + "\n")
    assert main("compile model -p @recipe.txt --calibration text.txt -o OUT -q".split()) == 0
    values = {round(a, 3) for row in found["units"] for a in row["active"]}
    assert {round(a, 3) for a in sparsify.load("OUT").active.values()} == values
    capsys.readouterr()
    assert main(words.split()) == 2  # the recipe is there
    assert "recipe.txt exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("search model", "missing option '--target'"),
        ("search model --target flop=0.5", "did you mean 'flops'"),
        ("search model --target flops=2", "above 0 and below 1"),
        ("search model --target flops=0.5 -p ffn-meo", "did you mean 'ffn-moe'"),
        ("search model --target flops=0.5 --levels 1,0.5", "cannot hold 1"),
        ("search model --target flops=0.5 --max-kl 0", "--max-kl cannot be 0"),
        ("search model --target flops=0.5 --calibration nowhere.txt", "no such text file"),
        ("search model --target flops=0.5 -o gone/x --json .", "--json . is a folder"),
        ("search nowhere --target flops=0.5", "nowhere"),
    ],
)
def test_mistakes_cost_no_waiting(
    words: str, said: str, lettered: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(lettered)
    assert main(words.split()) == 2
    assert said in capsys.readouterr().err


def test_an_unreachable_target_writes_nothing(
    lettered: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(lettered)
    words = "search model --target flops=0.05 --calibration text.txt --tokens 64 -o no.txt -q"
    assert main(words.split()) == 2
    assert "hidden-route cannot reach flops=0.05" in capsys.readouterr().err
    assert not Path("no.txt").exists()
