"""User errors: one class per mistake, each says what, where, why and what to do.

Nothing here imports torch, so usage errors are fast. ``SparsifyError.render`` is the only place
that lays an error out; the command line prints it and exits with ``exit_code``
(0 done, 1 a claim failed, 2 usage or bad input, 3 nothing matched).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, ClassVar


class SparsifyError(Exception):
    """Base of every error that a user can cause and mend.

    Args:
        what: one line that says what is wrong.
        where: file, region or pipeline position (may hold several lines, e.g. a caret drawing).
        why: the reason, where ``what`` does not say it.
        help: what to do next.
    """

    exit_code: ClassVar[int] = 2
    tag: ClassVar[str] = ""

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        why: str | None = None,
        help: str | None = None,  # noqa: A002  (the word users read)
    ) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.why = why
        self.help = help

    def render(self) -> str:
        """The message as the command line prints it, without colour."""
        lines = [f"error: {self.what}" + (f"   [{self.tag}]" if self.tag else "")]
        for text in (self.why, self.where):
            if text:
                lines += [f"  {line}" for line in text.splitlines()]
        if self.help:
            first, *rest = self.help.splitlines()
            lines.append(f"  help: {first}")
            lines += [f"        {line}" for line in rest]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.render().removeprefix("error: ")


class GrammarError(SparsifyError):
    """The pipeline text does not parse."""


class UnknownPass(SparsifyError):
    """No pass of that name is installed."""


class BadOption(SparsifyError):
    """A pass option is unknown, has the wrong type or is out of range."""


class PassClash(SparsifyError):
    """Two packages register a pass under the same name, or a registered pass is malformed."""


class ForeignPackage(SparsifyError):
    """Another distribution owns the import name ``sparsify``."""


class MissingDependency(SparsifyError):
    """An optional dependency is not installed; ``help`` carries the pip line."""


class ModelNotFound(SparsifyError):
    """MODEL names nothing that can be loaded."""


class ModelUnreadable(SparsifyError):
    """The model's files are there but broken, unsafe or of an unknown kind."""


class CaptureFailed(SparsifyError):
    """torch.export could not capture the model."""

    tag = "capture"


class NotCaptured(SparsifyError):
    """The sparse model was called with an input that its graph does not cover."""

    tag = "not captured"


class BadInput(SparsifyError):
    """A value, text or file given by the user cannot be used."""


class BadWeights(SparsifyError):
    """The model's weights hold NaN or infinity."""


class OutputError(SparsifyError):
    """An output exists already or cannot be written."""


class BadCheckpoint(SparsifyError):
    """A saved sparse model is damaged, incomplete or of an unknown version."""


class NothingMatched(SparsifyError):
    """No region of the model fits any pass of the pipeline."""

    exit_code = 3
    tag = "nothing matched"


class NothingRewritten(NothingMatched):
    """Regions matched, but every pass refused all of them or was told to leave them."""

    tag = "refused"


class ClaimFailed(SparsifyError):
    """A rewrite did not keep its claim.

    ``reproducer`` is the folder that shows it; ``evidence`` the failed checks
    (:class:`sparsify.report.Evidence`).
    """

    exit_code = 1
    tag = "claim failed"
    reproducer: str | None = None
    evidence: Any = ()


class NotExported(SparsifyError):
    """An operator or a routed module cannot be written as ONNX."""

    tag = "not exported"


class ParityFailed(SparsifyError):
    """An exported file does not compute what the model computes."""

    exit_code = 1
    tag = "parity failed"


class SparsifyBug(SparsifyError):
    """An error of ours; ``help`` names the reproducer folder."""

    exit_code = 1
    tag = "bug in sparsify"


def did_you_mean(name: str, known: Iterable[str]) -> str | None:
    """``did you mean 'x'?`` for the closest of ``known``, or None; swapped letters are closest."""
    close = difflib.get_close_matches(name, list(known), n=5, cutoff=0.5)
    close.sort(key=lambda other: sorted(other) != sorted(name))
    return f"did you mean '{close[0]}'?" if close else None
