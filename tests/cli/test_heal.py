"""``sparsify heal``: a folder in, a healed folder out, the curves as JSON, killed or not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import sparsify
from sparsify.cli import main


class Letters:
    """A tokenizer of 120 letters."""

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [3 + ord(c) % 117 for c in text]}

    def save_pretrained(self, folder: str) -> None:
        """Nothing to save."""


def test_heal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    sparsify.compile("zoo:llama", "ffn-moe{experts=8 active=0.5}").save("saved")
    real = sparsify.api.load

    def load(path: Path) -> sparsify.SparseModel:
        model = real(path)
        model.tokenizer = Letters()
        return model

    monkeypatch.setattr("sparsify.api.load", load)
    words = "heal saved --text docstrings -o out --train all --steps 4 --every 2 --json c.json -q"
    assert main(words.split()) == 0
    curves = json.loads(Path("c.json").read_text())
    assert curves["format"] == "sparsify-healing"
    assert len(curves["steps"]) <= 4
    assert {"perplexity", "kl", "live"} <= set(curves["evaluations"][0])
    assert not Path("out.healing").exists()
    assert sparsify.verify("out").ok
    words = "heal saved --text docstrings -o again --train routed --half --batch 1 --steps 2 -q"
    assert main(words.split()) == 0
    assert sparsify.verify("again").ok


def lettered(folder: Path) -> None:
    """A routed zoo model with a tokenizer of letters, saved to ``folder``."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    letters = {"?": 0, **{chr(32 + n): 1 + n for n in range(60)}}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(letters, unk_token="?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    torch.manual_seed(0)
    model = sparsify.compile("zoo:llama", "ffn-moe{experts=8 active=0.5}")
    model.tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?")
    model.save(folder)


def test_killed_with_sigkill_and_resumed_is_the_straight_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lettered(tmp_path / "saved")
    Path("text.txt").write_text(
        "the quick brown fox jumps over a lazy dog, again and AGAIN. " * 150
    )
    words = (
        "heal saved --text text.txt --train lora --steps 12 --every 3 --rate 3 --schedule cubic "
        "--json {0}.json -q -o {0}"
    )
    assert main(words.format("straight").split()) == 0
    root, threads = str(Path(sparsify.__file__).parents[1]), str(torch.get_num_threads())
    started = subprocess.Popen(
        [sys.executable, "-m", "sparsify_fx", *words.format("killed").split()],
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": threads},
    )
    folder, until = Path("killed.healing"), time.monotonic() + 600  # on a loaded machine
    try:
        while not list(folder.glob("step-*/state.json")):
            assert started.poll() is None, "it ended by itself"
            assert time.monotonic() < until
            time.sleep(0.002)
    finally:
        started.kill()  # SIGKILL
    assert started.wait() == -signal.SIGKILL
    assert not Path("killed").exists()
    assert list(folder.glob("step-*/state.json"))
    assert main([*words.format("killed").split(), "--resume"]) == 0
    assert not folder.exists()
    one, two = sparsify.load("straight").state_dict(), sparsify.load("killed").state_dict()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    one, two = (json.loads(Path(f"{n}.json").read_text()) for n in ("straight", "killed"))
    assert [row["loss"] for row in one["steps"]] == [row["loss"] for row in two["steps"]]
    assert one["final"] == two["final"]
    assert one["improved"]
