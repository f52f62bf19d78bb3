"""Failed captures say what broke, on which of the user's lines, and what to try."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparsify.capture import capture
from sparsify.errors import CaptureFailed


def fails(model: nn.Module, example: object) -> CaptureFailed:
    with pytest.raises(CaptureFailed) as caught:
        capture(model, example)
    return caught.value


def test_a_branch_on_a_value_points_at_its_line() -> None:
    class Branch(nn.Module):
        def forward(self, x):
            if x.sum() > 0:  # the line
                return x
            return -x

    error = fails(Branch(), torch.randn(3, 4))
    assert "torch.export cannot capture Branch" in error.what
    assert error.where is not None
    assert "test_failures.py" in error.where
    assert "if x.sum() > 0" in error.where
    assert "torch.where" in str(error.help)


def test_a_model_that_does_not_run_points_at_its_line() -> None:
    class Broken(nn.Module):
        def forward(self, x):
            return x @ x  # (3, 4) @ (3, 4)

    error = fails(Broken(), torch.randn(3, 4))
    assert "does not run on the example" in error.what
    assert "return x @ x" in str(error.where)
    assert "example=" in str(error.help)


def test_randomness_shows_as_a_difference() -> None:
    class Noisy(nn.Module):
        def forward(self, x):
            return x + torch.rand_like(x)

    error = fails(Noisy(), torch.randn(3, 4))
    assert "differs from the model" in error.what
    assert "randomness" in str(error.help)


def test_results_that_are_no_tensors_are_refused() -> None:
    class Thing:
        pass

    class Returns(nn.Module):
        def __init__(self, result: object) -> None:
            super().__init__()
            self.result = result

        def forward(self, x):
            return self.result

    assert "Thing" in str(fails(Returns(Thing()), torch.randn(2, 2)))
    assert "returns no tensor" in str(fails(Returns(None), torch.randn(2, 2)))


def test_autocast_inside_the_model_is_refused() -> None:
    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return self.linear(x).float()

    assert "autocast" in str(fails(Cast(), torch.randn(2, 4)))


def test_the_caller_model_is_whole_after_a_failure() -> None:
    class Branch(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    model = Branch().train()
    fails(model, torch.randn(3, 4))
    assert model.training
    assert torch.backends.mha.get_fastpath_enabled()
