"""The command line: ``sparsify VERB``; torch loads only where a verb needs it."""

from sparsify.cli.entry import main

__all__ = ["main"]
