"""Rebuilding routed modules from JSON, third-party ones included."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsify.errors import BadCheckpoint, PassClash
from sparsify.runtime.ffn import RoutedFFN
from sparsify.runtime.router import Router
from sparsify.runtime.spec import RoutedModule, from_spec, is_routed, nested, routed
from tests.unit.runtime.examples import Dense


@routed
class Scaled(RoutedModule):
    """A third-party routed module."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale

    def options(self) -> dict[str, Any]:
        return {"size": self.scale.numel()}

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Scaled:
        return cls(options["size"])


def test_third_party_modules_round_trip() -> None:
    module = Scaled(3)
    module.pass_name = "scale"
    text = json.dumps(module.spec(), allow_nan=False)
    other = from_spec(json.loads(text))
    assert isinstance(other, Scaled)
    assert other.spec() == module.spec()
    assert is_routed(module)
    assert not is_routed(nn.Linear(2, 2))


def test_names_are_owned() -> None:
    class Router(RoutedModule):
        """Takes one of our names."""

    with pytest.raises(PassClash, match="'Router'"):
        routed(Router)


def test_unknown_and_damaged_specs() -> None:
    with pytest.raises(BadCheckpoint) as caught:
        from_spec({"class": "RoutedFNN"})
    assert "did you mean 'RoutedFFN'" in str(caught.value)
    for spec in ({}, {"class": 3}, {"class": "Router"}, {"class": "RoutedFFN", "experts": "x"}):
        with pytest.raises(BadCheckpoint):
            from_spec(spec)
    with pytest.raises(BadCheckpoint, match="belongs"):
        nested(Dense().router.spec(), RoutedFFN)
    assert isinstance(nested(Dense().router.spec(), Router), Router)


def test_meta_device() -> None:
    with torch.device("meta"):
        module = from_spec(Dense(dropped=True).routed().spec())
    assert all(p.is_meta for p in module.parameters())


def test_importing_the_package_loads_no_torch() -> None:
    code = (
        "import sys, sparsify.runtime as r; assert 'torch' not in sys.modules; "
        "assert all(hasattr(r, name) for name in r.__all__); assert 'torch' in sys.modules; "
        "assert not any(m.startswith(('transformers', 'triton.', 'numpy.f2py')) "
        "for m in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=".", env=_env())


def _env() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": "."}
