"""Multiple-choice questions: files and their errors, scores against plain sums."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsify import choices, questions
from sparsify.errors import BadInput
from sparsify.questions import Question
from tests.unit.test_evaluate import VOCAB, Language, ids


class Letters:
    """One token per letter, of a small vocabulary."""

    def encode(self, text: str) -> list[int]:
        return [ord(c) % VOCAB for c in text]


def file_of(folder: Path, *lines: Any) -> Path:
    file = folder / "q.jsonl"
    file.write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n\n"
    )
    return file


ARC = {"text": ["one", "two", "three"], "label": ["1", "2", "3"]}


@pytest.mark.parametrize(
    ("given", "answer"),
    [
        ({"choices": ["x", "y"], "answer": 1}, 1),
        ({"choices": ["x", "y"], "answer": "B"}, 1),
        ({"choices": ["x", "y"], "answer": "y"}, 1),
        ({"choices": ["B", "A"], "answer": "A"}, 1),  # a choice before a letter
        ({"choices": ARC, "answerKey": "3"}, 2),
        ({"choices": ARC, "answer": 0}, 0),
    ],
)
def test_answers_in_every_spelling(tmp_path: Path, given: dict[str, Any], answer: int) -> None:
    (found,) = questions.read(file_of(tmp_path, {"question": "which?", "more": 3, **given}))
    assert found.answer == answer
    assert found.question == "which?"


GOOD = {"question": "which?", "choices": ["x", "y"], "answer": 0}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "not JSON"),
        ("[1]", "a list, not an object"),
        ({**GOOD, "question": " "}, "'question' is missing, empty"),
        ({**GOOD, "choices": ["x"]}, "two or more texts"),
        ({**GOOD, "choices": ["x", ""]}, "two or more texts"),
        ({**GOOD, "choices": "xy"}, "two or more texts"),
        ({**GOOD, "choices": {"text": ["x", "y"], "label": ["A"]}}, "as many labels"),
        ({"question": "?", "choices": ["x", "y"]}, "'answer' is missing"),
        ({**GOOD, "answer": 2}, "the answer 2 is none of the 2 choices"),
        ({**GOOD, "answer": True}, "the answer True"),
        ({**GOOD, "answer": "z"}, "the answer 'z'"),
        ({**GOOD, "answer": ""}, "the answer ''"),
    ],
)
def test_broken_lines_are_named(tmp_path: Path, line: Any, says: str) -> None:
    file = file_of(tmp_path, GOOD, "", line)
    with pytest.raises(BadInput, match=r"q\.jsonl holds a line that is no") as caught:
        list(questions.read(file))
    assert "line 3" in str(caught.value)
    assert says in str(caught.value).replace("is not JSON", "not JSON")


def test_files_without_questions(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="is empty"):
        list(questions.read(file_of(tmp_path, "")))
    with pytest.raises(BadInput, match="no such text file"):
        list(questions.read(tmp_path / "not-there.jsonl"))


def test_a_sample_is_uniform_and_in_order() -> None:
    pool = [Question(str(i), ("a", "b"), 0) for i in range(50)]
    assert questions.sample(iter(pool), 100, 0) == pool
    counts = dict.fromkeys(range(50), 0)
    for seed in range(400):
        numbers = [int(q.question) for q in questions.sample(iter(pool), 10, seed)]
        assert numbers == sorted(numbers) and len(numbers) == 10
        for n in numbers:
            counts[n] += 1
    assert min(counts.values()) > 40 and max(counts.values()) < 130  # 80 each, on average
    one = questions.sample(iter(pool), 10, 5)
    assert one == questions.sample(iter(pool), 10, 5)


def test_scores_are_log_likelihoods_per_character() -> None:
    model, question = Language(), Question("who?", ("me", "not you"), 1)
    found = choices.Answers()
    with torch.no_grad():
        found.add(model, choices.reading(Letters(), question))
    scores = []
    for choice in question.choices:
        whole = torch.tensor([Letters().encode(f"who? {choice}")])
        logs = model(whole).detach().log_softmax(-1)[0]
        chosen = [float(logs[at - 1, whole[0, at]]) for at in range(4, whole.shape[1])]
        scores.append(sum(chosen) / len(choice))
    best = scores.index(max(scores))
    assert found.picked == [best]
    assert found.right == [best == 1]
    log_share = torch.tensor(scores).log_softmax(0)[1]
    assert found.sure == pytest.approx(float(log_share), rel=1e-5)


def test_a_choice_without_tokens_is_an_error() -> None:
    class Nothing:
        def encode(self, text: str) -> list[int]:
            return []

    with pytest.raises(BadInput, match="cannot be told from its question"):
        choices.reading(Nothing(), Question("q", ("a", "b"), 0))


def test_rows_stand_beside_dense_and_baselines() -> None:
    model = Language()
    asked = [Question(f"q{i}?", ("ab", "cd", "ef" * (i % 3 + 1)), i % 3) for i in range(24)]
    found = choices.choices(
        model, asked, Letters(), file="f", active=(1.0, 0.5), calibration=[ids()]
    )
    assert [(r.model, r.active) for r in found.rows] == [
        ("dense", 1.0), ("routed", 1.0), ("routed", 0.5), ("static pruning", 0.5), ("TEAL", 0.5),
    ]  # fmt: skip
    dense, full, half, static, rival = found.rows
    assert found.chance == pytest.approx(1 / 3)
    assert (full.accuracy, full.agreement, full.difference) == (dense.accuracy, 1, 0)
    assert half.difference == pytest.approx(half.accuracy - dense.accuracy)
    assert half.accuracy_within is not None
    assert half.accuracy_within.low <= half.accuracy <= half.accuracy_within.high
    assert static.flops is not None and rival.flops is not None
    assert "guessing gets 33.3 %" in found.render(100)
    assert max(map(len, found.render(100).splitlines())) <= 100


def test_runs_get_ids_of_one_choice_at_a_time() -> None:
    shapes: list[tuple[int, ...]] = []

    def run(tokens: Tensor) -> Tensor:
        shapes.append(tuple(tokens.shape))
        return torch.zeros(*tokens.shape, VOCAB)

    question = choices.reading(Letters(), Question("who?", ("a", "bcd"), 0))
    choices.ask(run, {}, [question])
    assert shapes == [(1, 6), (1, 8)]
    assert question.tokens == 14
