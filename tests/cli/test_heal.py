"""``sparsify heal``: a folder in, a healed folder out, the curves as JSON."""

from __future__ import annotations

import json
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
