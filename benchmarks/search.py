"""Budget search against one even budget and the dial's own allocation, on held-out text.

``python benchmarks/search.py`` searches SmolLM2-135M for 60 % of the dense FLOPs with hidden-route,
then measures every setting that was tried at that cost on the held-out half of two kinds of text:
perplexity beside the dense model's, and how much of the even budget's gap the search closes. Costs
are counted again there, by the units that were really live. Intervals are paired bootstraps over
texts. Writes benchmarks/results/search.json, again after every few sequences: a run cut short has
measured fewer tokens.

The search's time is given twice, by the clock and as CPU seconds of the process over two cores: on
a machine that others use, the clock says little.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparsify import api
from sparsify.bootstrap import Bootstrap
from sparsify.corpus import token_text
from sparsify.costs import routed_cost
from sparsify.evaluate import Score
from sparsify.models import Loaded, load_model
from sparsify.runtime.budget import Budgeted
from sparsify.runtime.counters import counters, reset
from sparsify.runtime.dial import routers, set_each
from sparsify.runtime.model import SparseModel
from sparsify.searching import PASSES, search
from sparsify.searching_result import Search

KINDS = ("docstrings", "licences")
CORES = 2
EVERY = 2  # batches of a text between two writes
RESULTS = Path(__file__).parent / "results" / "search.json"


def main(arguments: Sequence[str] | None = None, loaded: Loaded | None = None) -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--target", default="flops=0.6")
    options.add_argument("--passes", default=PASSES)
    options.add_argument("--calibration", default="mixed")
    options.add_argument("--tokens", type=int, default=25600, help="of each held-out text")
    options.add_argument("--searched", type=int, default=512, help="tokens that are searched on")
    options.add_argument("--rounds", type=int, default=0)
    options.add_argument("--points", type=int, default=6)
    options.add_argument("--output", type=Path, default=RESULTS)
    given = options.parse_args(arguments)
    if "active" in given.passes:
        options.error("budgets are what is searched: --passes has no active=")
    loaded = loaded or load_model("smollm2")
    wall, cpu = time.perf_counter(), time.process_time()
    found = search(
        loaded.model, given.target, passes=given.passes, calibration=given.calibration,
        tokenizer=loaded.tokenizer, tokens=given.searched, rounds=given.rounds,
        points=given.points, progress=said,
    )  # fmt: skip
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    minutes = {"wall": wall / 60, f"cpu_over_{CORES}_cores": cpu / 60 / CORES}
    print(found.text_table(width=120))
    print(f"\nsearched in {wall / 60:.1f} minutes; {cpu / 60:.1f} CPU minutes", flush=True)
    report: dict[str, Any] = {"model": loaded.name, "machine": api.machine(), "minutes": minutes}
    report["search"] = found.to_dict()
    given.output.parent.mkdir(exist_ok=True)
    given.output.write_text(json.dumps(report, indent=1) + "\n")
    if found.sparse is not None:
        found.sparse.lower()  # measured with our kernels, twice as fast as eager
    texts = [Text.of(kind, loaded.tokenizer, given.tokens, found) for kind in KINDS]
    going = [text.measure() for text in texts]
    rows: list[dict[str, Any]] = []
    for _ in itertools.zip_longest(*going):  # in turns
        rows = [row for text in texts for row in text.rows()]
        report["rows"] = rows
        given.output.write_text(json.dumps(report, indent=1) + "\n")
    for row in rows:
        line = "{text:<12}{setting:<18}{flops:>8.3f} of the FLOPs, perplexity x {ratio:.3f}, "
        line += "KL {kl:.4f}"
        if row["gap_closed"] is not None:
            line += ", {gap_closed:.0%} of the even budget's gap, within {within}"
        print(line.format(**row), flush=True)


def said(what: str, at: int, of: int) -> None:
    """Print how far it is, not too often."""
    if at == of or at % 40 == 0:
        print(f"{what} {at}/{of}", flush=True)


@dataclasses.dataclass
class Text:
    """Held-out text, and what every setting does to it.

    Attributes:
        batches: token ids; starts: of every row, the text that it starts in.
        settings: name -> budgets, the dense limit first.
        scores, live: of every setting: sums, and path -> [live units, all units].
    """

    kind: str
    sparse: SparseModel
    batches: list[torch.Tensor]
    starts: tuple[int, ...]
    settings: dict[str, dict[Budgeted, float]]

    def __post_init__(self) -> None:
        self.scores = {name: Score() for name in self.settings}
        self.live: dict[str, dict[str, list[int]]] = {name: {} for name in self.settings}

    @classmethod
    def of(cls, kind: str, tokenizer: Any, tokens: int, found: Search) -> Text:
        """``tokens`` of the held-out half of ``kind``, for all that a search tried."""
        assert found.sparse is not None
        text = token_text(kind, tokenizer, limit=tokens, split="held-out")
        everything = {router: 1.0 for _, router in routers(found.sparse)}
        settings = {"dense": everything}
        settings |= {name: {**everything, **each} for name, each in found.settings.items()}
        return cls(kind, found.sparse, list(text.batches), text.texts, settings)

    def measure(self) -> Iterator[None]:
        """Run every setting over the text; now and then, the caller may look."""
        for number, ids in enumerate(self.batches):
            dense: torch.Tensor | None = None
            for name, setting in self.settings.items():
                set_each(self.sparse.graph, setting)
                reset(self.sparse)
                with torch.no_grad():
                    logits = self.sparse(input_ids=ids, use_cache=False).logits
                if dense is None:
                    dense = logits.float().log_softmax(-1)
                for row in range(len(ids)):
                    one = slice(row, row + 1)
                    self.scores[name].add(logits[one], dense[one], ids[one])
                for path, counter in counters(self.sparse):
                    sums = self.live[name].setdefault(path, [0, 0])
                    sums[0] += counter.units_live
                    sums[1] += counter.units_total
            if (number + 1) % EVERY == 0 or number + 1 == len(self.batches):
                yield

    def rows(self) -> Iterator[dict[str, Any]]:
        """One for every setting, on what was measured so far."""
        nll = {name: np.array([row[1] for row in s.rows]) for name, s in self.scores.items()}
        counts = np.array([row[0] for row in self.scores["dense"].rows])
        draws = Bootstrap(self.starts[: len(counts)])
        drawn = draws.sums(np.stack([counts, *nll.values()], axis=1))
        perplexities = dict(zip(nll, np.exp(drawn[:, 1:] / drawn[:, :1]).T, strict=True))
        base, even = self.scores["dense"].perplexity, self.scores.get("even", Score()).perplexity
        for name, score in self.scores.items():
            gap = within = None
            if "even" in perplexities and name not in ("dense", "even"):
                gap = (even - score.perplexity) / (even - base)
                others = perplexities["even"] - perplexities[name]
                interval = draws.within(others / (perplexities["even"] - perplexities["dense"]))
                within = interval and (round(interval.low, 4), round(interval.high, 4))
            yield {
                "text": self.kind, "setting": name, "tokens": score.tokens,
                "perplexity": score.perplexity, "ratio": score.perplexity / base,
                "kl": score.mean_kl, "top1": score.top1, "flops": self._share(name),
                "gap_closed": gap, "within": within,
            }  # fmt: skip

    def _share(self, name: str) -> float:
        """FLOPs over the dense model's, with as many units live as were counted."""
        sparse, report = self.sparse, self.sparse.report
        nodes = [n for n in sparse.graph.graph.nodes if n.op == "call_module"]
        set_each(sparse.graph, self.settings["dense"])  # as the report counted it
        whole = routed_cost(sparse.graph, nodes, context=report.context)
        set_each(sparse.graph, self.settings[name])
        real = {sparse.get_submodule(p): a / b for p, (a, b) in self.live[name].items() if b}
        spent = routed_cost(sparse.graph, nodes, context=report.context, live=real)
        flops = report.sparse.flops_per_token - whole.flops + spent.flops
        return float(flops / report.dense.flops_per_token)


if __name__ == "__main__":
    main()
