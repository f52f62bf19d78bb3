"""Multiple choice: which continuation of a sentence is the text's own?

    python benchmarks/quality/choices.py

Writes benchmarks/results/choices.json. The questions are made from held-out text, since no question
set is on every machine: a sentence is cut in the middle, and its second half stands among those of
three other sentences of the same text kind (as in HellaSwag, arXiv:1905.07830, but unfiltered, so
easier). ``--questions FILE`` takes a file instead: one JSON object a line, with ``question``,
``choices`` and ``answer``. The figures are the accuracy of picking the likeliest continuation per
character, and how often that is the dense model's pick.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import common

import sparsify
from sparsify import api
from sparsify.corpus import KINDS
from sparsify.report_json import encode
from sparsify.sentences import sentences_of

WORDS = 12  # of a sentence, at least


def questions(kind: str, count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Questions made of the held-out half of a built-in text."""
    draw = random.Random(seed)
    found = dict.fromkeys(s for text in KINDS[kind]("held-out") for s in sentences_of(text))
    pool = [words for words in map(str.split, found) if len(words) >= WORDS]
    draw.shuffle(pool)
    halves = [(" ".join(w[: len(w) // 2]), " ".join(w[len(w) // 2 :])) for w in pool]
    for at, (start, end) in enumerate(halves[:count]):
        others = draw.sample([h[1] for i, h in enumerate(halves) if i != at], 3)
        answer = draw.randrange(4)
        others.insert(answer, end)
        yield {"question": start, "choices": others, "answer": answer}


def main(arguments: Sequence[str] | None = None) -> None:
    options = common.options(__doc__, "choices.json", 0)
    options.add_argument("--pipeline", default="ffn-moe")
    options.add_argument("--kinds", default="docstrings,licences", help="texts for questions")
    options.add_argument("--fitted", default="docstrings", help="the text to fit on")
    options.add_argument("--count", type=int, default=500, help="questions of a kind")
    options.add_argument("--questions", type=Path, help="a JSONL file instead")
    given = options.parse_args(arguments)
    loaded = common.model("smollm2", "zoo:llama" if given.quick else None)
    tables = common.Tables(given.output, model=loaded.name, pipeline=given.pipeline)
    sparse = sparsify.compile(
        loaded.model, given.pipeline, calibration=given.fitted, tokenizer=loaded.tokenizer,
        seed=given.seed,
    )  # fmt: skip
    measuring = common.measuring(given)
    del measuring["tokens"]
    with tempfile.TemporaryDirectory() as folder:
        files = {str(given.questions): given.questions} if given.questions else {}
        for kind in () if files else given.kinds.split(","):
            files[kind] = Path(folder) / f"{kind}.jsonl"
            lines = map(json.dumps, questions(kind, given.count, given.seed))
            files[kind].write_text("\n".join(lines), encoding="utf-8")
        for name, file in files.items():
            found = api.evaluate(
                sparse, choices=file, calibration=given.fitted, questions=given.count, **measuring
            ).choices
            assert found is not None
            tables.add(f"questions of {name}", found.render(100), {"of": name, **encode(found)})


if __name__ == "__main__":
    main()
