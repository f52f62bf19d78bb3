"""What the scripts of this folder share: options, the model, tables as JSON, written as they come.

All run on SmolLM2-135M or MiniLM (packages that ``make`` installs) and on texts that are on every
machine: ``docstrings``, ``licences``, ``reference`` and ``code``, each with a calibration half and
a held-out half that share no paragraph. ``--quick`` takes a tiny random model, for tests.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sparsify import api
from sparsify.evaluate import Score, logits_of
from sparsify.models import Loaded, load_model

RESULTS = Path(__file__).parents[1] / "results"


class Letters:
    """A tokenizer of letters, for the tiny models."""

    eos_token_id = 1

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        ids = [3 + ord(letter) % 90 for letter in text]
        return {"input_ids": ids[: options.get("max_length", len(ids))]}


def options(description: str | None, output: str, tokens: int) -> argparse.ArgumentParser:
    """The options that all scripts have."""
    found = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--active", default="1,0.75,0.5", help="budgets")
    found.add_argument("--tokens", type=int, default=tokens, help="of each held-out text")
    found.add_argument("--baselines", default="static,teal", help="static, teal, both or none")
    found.add_argument("--seed", type=int, default=0, help="of samples and resamples")
    found.add_argument("--quick", action="store_true", help="a tiny random model")
    found.add_argument("--output", type=Path, default=RESULTS / output)
    return found


def measuring(given: argparse.Namespace) -> dict[str, Any]:
    """What ``api.evaluate`` takes of the options."""
    return {
        "active": [float(a) for a in given.active.split(",")],
        "baselines": [b for b in given.baselines.split(",") if b not in ("", "none")],
        "tokens": given.tokens,
        "seed": given.seed,
    }


def model(name: str, quick: str | None) -> Loaded:
    """A real model with its tokenizer, or a tiny one of letters."""
    return load_model(name) if quick is None else load_model(quick, tokenizer=Letters())


class Dense:
    """The dense model's next-token log-probabilities on a text, computed once for many others.

    4,096 tokens of SmolLM2 are 0.8 GB.
    """

    def __init__(self, model: Any, batches: Sequence[torch.Tensor]) -> None:
        self.rows = [ids for batch in batches for ids in batch.split(1)]
        self.own = Score()
        self.known: list[torch.Tensor] = []
        with torch.no_grad():
            for ids in self.rows:
                self.known.append(logits_of(model(ids)).float().log_softmax(-1))
                self.own.add(self.known[-1], self.known[-1], ids)

    def beside(self, model: Any) -> dict[str, float]:
        """Perplexity, its ratio to the dense one, KL and top-1 agreement of another model."""
        score = Score()
        with torch.no_grad():
            for ids, known in zip(self.rows, self.known, strict=True):
                score.add(logits_of(model(ids)), known, ids)
        return {
            "perplexity": score.perplexity, "ratio": score.perplexity / self.own.perplexity,
            "kl": score.mean_kl, "top1": score.top1,
        }  # fmt: skip


class Tables:
    """A JSON file of tables, written again after each, so that a run cut short loses one."""

    def __init__(self, output: Path, **facts: Any) -> None:
        self.output = output
        self.found: dict[str, Any] = {**facts, "machine": api.machine(), "tables": []}

    def add(self, title: str, text: str, table: dict[str, Any]) -> None:
        """Print a table and keep it."""
        print(f"\n{title}\n{text}", flush=True)
        self.found["tables"].append(table)
        self.output.parent.mkdir(exist_ok=True, parents=True)
        self.output.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")
