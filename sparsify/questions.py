"""Multiple-choice questions in files.

A file has one question a line, as JSON: ``question``, ``choices`` (texts; or, as ARC has it,
``{"text": [...], "label": [...]}``) and ``answer`` or ``answerKey``: the number of the choice from
0, its label, its letter, or its text. What is to stand before a question (a few solved ones,
``Question:``) belongs into ``question``.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
import string
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sparsify import sources
from sparsify.errors import BadInput

QUESTIONS = 1000  # of a file; of one that has more, a seeded sample is taken


@dataclasses.dataclass(frozen=True)
class Question:
    """A question; ``answer`` is the number of the right choice."""

    question: str
    choices: tuple[str, ...]
    answer: int


def read(path: str | Path) -> Iterator[Question]:
    """The questions of a JSONL file, one after the other.

    Raises:
        BadInput: with the line, where one is no question; or there is none.
    """
    empty = True
    for line, value in sources.json_lines(path):
        empty = False
        try:
            yield _question(value)
        except ValueError as error:
            raise BadInput(
                f"{path} holds a line that is no question",
                where=f"line {line}: {error}",
                help='a line is {"question": "...", "choices": ["...", "..."], "answer": 0}',
            ) from None
    if empty:
        raise BadInput(f"{path} holds no question")


def check(path: str | Path) -> None:
    """BadInput where the first lines of a file are no questions; the rest is read when used."""
    for _ in itertools.islice(read(path), 64):
        pass


def _question(value: Any) -> Question:
    """Raises ValueError with what is wrong."""
    if not isinstance(value, dict):
        raise ValueError(f"a {type(value).__name__}, not an object")
    question, given = value.get("question"), value.get("choices")
    labels: Any = None
    if not isinstance(question, str) or not question.strip():
        raise ValueError("'question' is missing, empty or not a text")
    if isinstance(given, dict):
        labels, given = given.get("label"), given.get("text")
    listed = given if isinstance(given, list) else []
    texts = [choice for choice in listed if isinstance(choice, str) and choice.strip()]
    if len(texts) < max(len(listed), 2):
        raise ValueError("'choices' is not a list of two or more texts")
    if labels is not None and (not isinstance(labels, list) or len(labels) != len(texts)):
        raise ValueError("'choices' has not as many labels as texts")
    key = next((k for k in ("answer", "answerKey") if k in value), None)
    if key is None:
        raise ValueError("'answer' is missing")
    return Question(question, tuple(texts), _answer(value[key], texts, labels))


def _answer(answer: Any, texts: Sequence[str], labels: Sequence[Any] | None) -> int:
    letters = string.ascii_uppercase[: len(texts)]
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(texts):
        return answer
    if isinstance(answer, str):
        for known in (labels or (), texts, letters):
            if answer in known and answer:
                return list(known).index(answer)
    raise ValueError(
        f"the answer {answer!r} is none of the {len(texts)} choices: a number from 0, a label, a "
        "letter or the text of one"
    )


def sample(questions: Iterator[Question], size: int, seed: int) -> list[Question]:
    """At most ``size`` questions, each as likely as any other, in the order of the file."""
    draw = random.Random(seed)
    held: list[tuple[int, Question]] = []
    for number, question in enumerate(questions):
        if len(held) < size:
            held.append((number, question))
        elif (slot := draw.randrange(number + 1)) < size:
            held[slot] = (number, question)
    return [question for _, question in sorted(held, key=lambda item: item[0])]
