"""The groups of the test suite: who runs beside whom, and that the scheduler keeps to it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from sparsify import zoo
from tests.groups import group_of, scheduler

CONTRACT = "tests/contract/test_contract.py"


@pytest.mark.parametrize(
    ("nodeid", "group"),
    [
        ("tests/unit/test_x.py::test_a[llama]", "tests/unit/test_x.py"),
        ("tests/docs/test_readme.py::test_a", "tests/docs/test_readme.py::test_a"),
        (f"{CONTRACT}::test_dense_limit[fp32-llama-attn-moh]", "test_contract.py llama"),
        (f"{CONTRACT}::test_dense_limit[fp32-llama-eager-ffn-moe]", "test_contract.py llama-eager"),
        (f"{CONTRACT}::test_calibrated[phi3]", "test_contract.py phi3"),
        ("tests/contract/test_pairs.py::test_b[gpt2-ffn-moe+attn-moh-fp64]", "test_pairs.py gpt2"),
        ("tests/contract/test_pairs.py::test_matrix_in_the_readme", "test_pairs.py llama"),
    ],
)
def test_group_of(nodeid: str, group: str) -> None:
    assert group_of(nodeid) == group


def test_every_model_of_the_zoo_has_its_own() -> None:
    found = {group_of(f"{CONTRACT}::test_save_and_load[{n}-ffn-mode]") for n in zoo.names()}
    assert len(found) == len(zoo.names())


def test_the_scheduler_splits_by_group() -> None:
    pytest.importorskip("xdist")
    config = SimpleNamespace(
        option=SimpleNamespace(), getvalue=lambda name: ["1*popen"] if name == "tx" else None,
    )  # fmt: skip
    made = scheduler(config, None)
    assert made._split_scope("tests/unit/test_x.py::test_a") == "tests/unit/test_x.py"
    assert config.option.loadscopereorder is False
