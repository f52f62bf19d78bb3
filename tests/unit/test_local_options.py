"""Options of some regions only, ``active@PATTERN=0.25``, from the text to the routers."""

from __future__ import annotations

import pytest

import sparsify
from sparsify.errors import BadOption


def test_a_local_budget_is_that_of_each_region_it_matches() -> None:
    sparse = sparsify.compile(
        "zoo:llama", "hidden-route{active=0.5 active@*.0.mlp.*=0.25 active@*.0.mlp.up_proj=1}"
    )
    for path, active in sparse.active.items():
        inside = ".0.mlp." in path
        assert active == (1.0 if "0.mlp.up_proj" in path else 0.25 if inside else 0.5), path


def test_other_options_are_local_too_and_two_stages_keep_their_budgets() -> None:
    sparse = sparsify.compile(
        "zoo:llama",
        "ffn-moe{experts=8 experts@*.0.mlp=4 active=0.5 at=*.0.mlp},ffn-moe{experts=8 active=0.75}",
    )
    sizes = [len(sparse.get_submodule(f"model.layers.{n}.mlp.moe").up) for n in (0, 1)]
    assert sizes == [4, 8]
    assert list(sparse.active.values()) == [0.5, 0.75]
    assert "experts@*.0.mlp=4" in sparse.pipeline


def test_a_bad_local_option_is_pointed_at() -> None:
    with pytest.raises(BadOption) as caught:
        sparsify.compile("zoo:llama", "ffn-moe{experts=8 active@*.0.mlp=2}")
    text = caught.value.render()
    assert "option 'active' of ffn-moe cannot be 2" in text
    assert "^" in text.splitlines()[-2]
