"""What tests of CPU kernels need: a compiler, no autograd, and the threads as they were."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from sparsify.codegen.cpu import build


@pytest.fixture
def kernels() -> Iterator[None]:
    """Skips without a compiler."""
    try:
        build.compiler()
    except build.NoCompiler as missing:
        pytest.skip(missing.what)
    threads = torch.get_num_threads()
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)
