"""The pipeline grammar: ``ffn-moe{experts=8 at=model.layers.[4-27].mlp},attn-moh{active=0.75}``.

    pipeline := item ((',' | newline) item)*          spaces, newlines and # comments are free
    item     := '@' file | name ['{' (key ['@' paths] '=' value)* '}']
    value    := true | false | integer | number | bare-text | "quoted" | 'quoted'

``parse`` gives one :class:`StageText` per pass, ``unparse`` the canonical text, and
``parse(unparse(stages)) == stages``. The keys ``at`` and ``skip`` name the regions that a stage
works on (:func:`match_path`); the other keys are options of the pass (``sparsify.registry``).
``active@model.layers.[0-3].mlp=0.7`` is an option of the regions that the path pattern matches: the
last that matches counts there, whatever the plain option says. ``@recipe.txt`` stands for the
contents of that file. Errors draw a caret under the culprit.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path

from sparsify.errors import BadInput, GrammarError
from sparsify.text_paths import bad_pattern, match_path

__all__ = ["Source", "StageText", "match_path", "parse", "unparse"]

Value = int | float | str | bool
Span = tuple[int, int]
Local = tuple[str, str, Value]  # option name, path pattern, value

_SELECTORS = ("at", "skip")
_SPACE = re.compile(r"(?:\s|#[^\n]*)*")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
_BARE = re.compile(r"""(?:\[[^\]\s{}="'#]*\]|[^\s\[\]{},="'#])+""")
_DOUBLE = re.compile(r'"(?:[^"\\\n]|\\.)*"')
_SINGLE = re.compile(r"'(?:[^'\\\n]|\\.)*'")
_FILE = re.compile(r"""[^\s,{}"']+""")
_INTEGER = re.compile(r"[+-]?[0-9]+")
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][+-]?[0-9]+)?")
_STAGE = re.compile(r"\{[^{}]*\}")
_LOCAL = re.compile(r"""(?<=[{ ])[A-Za-z_][\w-]*@(?:"(?:[^"\\]|\\.)*"|[^\s="])+=[^\s}]+""")
_WORDS = {"true": True, "True": True, "false": False, "False": False}
_ODD = "[]{='\"#"
_QUOTING = "quote text that holds blanks or any of , = # [ ] { } ' \""
_WIDTH = 96  # longest line of a drawing


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a text came from: the command line (``file`` is None) or a recipe file."""

    text: str
    file: Path | None = None

    def caret(self, span: Span) -> str:
        """The line that holds ``span`` and a row of carets under it."""
        start, end = span
        first = self.text.rfind("\n", 0, start) + 1
        last = self.text.find("\n", first)
        line = self.text[first : last if last >= 0 else len(self.text)]
        line = "".join(c if c.isprintable() else " " for c in line)
        start, end = start - first, max(start + 1, min(end, first + len(line))) - first
        cut = 0
        if len(line) > _WIDTH:  # a window that keeps the carets in sight
            cut = max(0, min(start - _WIDTH // 3, len(line) - _WIDTH))
            line = line[cut : cut + _WIDTH]
            start, end = start - cut, min(end - cut, _WIDTH)
        drawing = line + "\n" + " " * _columns(line[:start])
        drawing += "^" * max(1, _columns(line[start:end]))
        if self.file is None:
            return drawing
        return f"{self.file}:{self.text.count(chr(10), 0, span[0]) + 1}\n{drawing}"


def _columns(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


@dataclasses.dataclass(frozen=True)
class StageText:
    """One pass of a pipeline as the user wrote it; equality looks at the meaning only.

    Attributes:
        name: the pass, e.g. ``ffn-moe``.
        options: option name -> value, as written (a pass checks names and types).
        at, skip: path patterns (see :func:`match_path`), or None.
        local: (option name, path pattern, value): options of some regions only.
        source: the text it stood in; None where the stage was made by a program.
        spans: where in ``source``: ``""`` is the pass name, ``key`` an option (``key@pattern``
            where it is local), ``key=`` its value.
    """

    name: str
    options: Mapping[str, Value] = dataclasses.field(default_factory=dict, hash=False)
    at: str | None = None
    skip: str | None = None
    local: tuple[Local, ...] = ()
    source: Source | None = dataclasses.field(default=None, compare=False, repr=False)
    spans: Mapping[str, Span] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    def __str__(self) -> str:
        """The canonical text of this stage."""
        local = [(f"{k}@{_write_text(pattern)}", v) for k, pattern, v in self.local]
        pairs = [*self.options.items(), *local, ("at", self.at), ("skip", self.skip)]
        inner = " ".join(
            f"{k}={_write_text(v) if k in _SELECTORS else _write(v)}"  # type: ignore[arg-type]
            for k, v in pairs
            if v is not None
        )
        return f"{self.name}{{{inner}}}" if inner else self.name

    def options_at(self, path: str) -> dict[str, Value]:
        """The options of the region at ``path``."""
        here = {k: v for k, pattern, v in self.local if match_path(pattern, path)}
        return {**self.options, **here}

    def selects(self, path: str) -> bool:
        """Whether this stage may work on the region at ``path``."""
        if self.at is not None and not match_path(self.at, path):
            return False
        return self.skip is None or not match_path(self.skip, path)

    def caret(self, key: str = "") -> str:
        """A drawing of this stage in its source, with carets under ``key`` (see ``spans``)."""
        if self.source is not None and key in self.spans:
            return self.source.caret(self.spans[key])
        text = str(self)
        found = re.search(rf"[{{ ]({re.escape(key.rstrip('='))})=", text) if key else None
        return Source(text).caret(found.span(1) if found else (0, len(self.name)))


def parse(text: str, *, file: Path | None = None) -> tuple[StageText, ...]:
    """The stages of a pipeline text.

    Args:
        text: the pipeline, or ``@file``.
        file: where ``text`` came from; files named inside it are relative to its folder.

    Raises:
        GrammarError: with a caret drawing.
        BadInput: a recipe file that is missing or not text.
    """
    return _Parser(Source(text, file), (file.resolve(),) if file else ()).pipeline()


def unparse(stages: Iterable[StageText]) -> str:
    """The canonical one-line text of ``stages``."""
    return ",".join(map(str, stages))


def shortened(text: str, most: int = 3) -> str:
    """A canonical pipeline text whose stages list at most ``most`` local options, for reports."""

    def short(stage: re.Match[str]) -> str:
        found = list(_LOCAL.finditer(stage.group()))
        if len(found) <= most:
            return stage.group()
        more = f"... {len(found) - most} more"
        at = found[most].start()
        return stage.group()[:at] + more + stage.group()[found[-1].end() :]

    return _STAGE.sub(short, text)


# ---------------------------------------------------------------------------- writing values


def _write(value: Value) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return value if _BARE.fullmatch(value) and _reads_as_text(value) else _quote(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"a pipeline text cannot hold {value}")
    return repr(value)


def _reads_as_text(word: str) -> bool:
    try:
        return isinstance(_read(word), str)
    except ValueError:  # a number out of range: text all the same where it is quoted
        return False


def _write_text(value: str) -> str:
    return value if _BARE.fullmatch(value) else _quote(value)


def _quote(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)


def _read(word: str) -> Value:
    """A bare word as the value it spells. Raises ValueError for a number out of range."""
    if word in _WORDS:
        return _WORDS[word]
    if _INTEGER.fullmatch(word):
        return int(word)
    if _NUMBER.fullmatch(word):
        number = float(word)
        if not math.isfinite(number):
            raise ValueError(f"{word} is too large")
        return number
    return word


# ---------------------------------------------------------------------------- parsing


class _Parser:
    """A cursor over one source; ``within`` are the recipe files that are being read."""

    def __init__(self, source: Source, within: tuple[Path, ...]) -> None:
        self.source, self.text, self.within = source, source.text, within
        self.at = 0

    def fail(self, what: str, span: Span | None = None, help: str | None = None) -> GrammarError:  # noqa: A002
        where = self.source.caret(span or (self.at, self.at + 1))
        return GrammarError(what, where=where, help=help)

    def space(self) -> bool:
        """Skip blanks and comments; whether a line ended."""
        start = self.at
        found = _SPACE.match(self.text, start)
        self.at = found.end() if found else start
        return "\n" in self.text[start : self.at]

    def take(self, pattern: re.Pattern[str]) -> str | None:
        found = pattern.match(self.text, self.at)
        if found is None:
            return None
        self.at = found.end()
        return found.group()

    def char(self) -> str:
        return self.text[self.at : self.at + 1]

    def pipeline(self) -> tuple[StageText, ...]:
        stages: list[StageText] = []
        self.space()
        if not self.char():
            raise GrammarError(
                "the pipeline is empty",
                where=str(self.source.file) if self.source.file else None,
                help="name a pass, e.g. ffn-moe; list them: sparsify passes",
            )
        while True:
            stages += self.item()
            newline = self.space()
            if not self.char():
                return tuple(stages)
            if self.char() == ",":
                self.at += 1
                self.space()
            elif not newline:
                raise self.fail(f"expected ',' or the end, not {self.char()!r}", help=self.hint())

    def hint(self) -> str | None:
        return {
            "}": "this '}' closes nothing",
            "=": "options go in braces: name{key=value}",
        }.get(self.char(), "passes are separated by ','")

    def item(self) -> tuple[StageText, ...]:
        start = self.at
        if self.char() == "@":
            return self.recipe()
        name = self.take(_NAME)
        if name is None:
            shown = f", not {self.char()!r}" if self.char() else ""
            raise self.fail(f"a pass name is expected here{shown}")
        spans: dict[str, Span] = {"": (start, self.at)}
        options: dict[str, Value] = {}
        after_name = self.at
        self.space()
        if self.char() != "{":
            self.at = after_name  # the blanks are the pipeline's: they may end the item
            return (StageText(name, {}, source=self.source, spans=spans),)
        local: list[Local] = []
        opening = self.at
        self.at += 1
        while True:
            self.space()
            if not self.char():
                raise self.fail("this '{' is never closed", (opening, opening + 1), "add '}'")
            if self.char() == "}":
                self.at += 1
                break
            if self.char() == "," and (options or local):
                self.at += 1
                continue
            self.option(name, options, local, spans)
        at, skip = (str(options.pop(k)) if k in options else None for k in _SELECTORS)
        return (StageText(name, options, at, skip, tuple(local), self.source, spans),)

    def option(
        self, name: str, options: dict[str, Value], local: list[Local], spans: dict[str, Span]
    ) -> None:
        start = self.at
        key = self.take(_KEY)
        if key is None:
            raise self.fail(f"an option of {name} is expected here, not {self.char()!r}")
        pattern = self.pattern(key) if self.char() == "@" else None
        full = key if pattern is None else f"{key}@{pattern}"
        twice = full in spans
        spans[full] = (start, self.at)
        self.space()
        if self.char() != "=":
            raise self.fail(f"option '{key}' has no value", spans[full], f"write {full}=VALUE")
        self.at += 1
        self.space()
        start = self.at
        value = self.value(key)
        spans[f"{full}="] = (start, self.at)
        if twice:
            raise self.fail(f"option '{full}' is given twice", (spans[full][0], self.at))
        if key in _SELECTORS and (why := bad_pattern(str(value))):
            raise self.fail(f"'{key}' is not a path pattern: {why}", spans[f"{key}="])
        if pattern is None:
            options[key] = value
        else:
            local.append((key, pattern, value))

    def pattern(self, key: str) -> str:
        """The path pattern after ``key``, from its '@' on."""
        self.at += 1
        start = self.at
        if self.char() and self.char() in "\"'":
            found = str(self.value("at"))
        else:
            found = self.take(_BARE) or ""
        span = (start - 1, max(self.at, start))
        if key in _SELECTORS:
            raise self.fail(f"'{key}' names the regions of the whole stage", span)
        if not found:
            raise self.fail(f"option '{key}' needs a path pattern after '@'", span, _QUOTING)
        if why := bad_pattern(found):
            raise self.fail(f"'{found}' is not a path pattern: {why}", span)
        return found

    def value(self, key: str) -> Value:
        start = self.at
        quote = self.char()
        if quote in ('"', "'") and quote:
            quoted = self.take(_DOUBLE if quote == '"' else _SINGLE)
            if quoted is None:
                raise self.fail("this quote is never closed", (start, start + 1))
            return self.unquote(quoted, start)
        word = self.take(_BARE)
        if word is None:
            shown = f", not {self.char()!r}" if self.char() else ""
            raise self.fail(f"option '{key}' needs a value{shown}", help=_QUOTING)
        if self.char() in _ODD and self.char():
            raise self.fail(f"{self.char()!r} cannot stand in this value", help=_QUOTING)
        if key in _SELECTORS:
            return word
        try:
            return _read(word)
        except ValueError as error:
            raise self.fail(f"option '{key}': {error}", (start, self.at)) from None

    def unquote(self, quoted: str, start: int) -> str:
        if quoted[0] == "'":
            return re.sub(r"\\(['\\])", r"\1", quoted[1:-1])
        try:
            return str(json.loads(quoted, strict=False))
        except ValueError:
            raise self.fail(
                "unknown escape in this text", (start, self.at), r"known: \" \\ \n \t \uXXXX"
            ) from None

    def recipe(self) -> tuple[StageText, ...]:
        start = self.at
        self.at += 1
        if self.char() == '"':
            name = self.unquote(self.take(_DOUBLE) or '""', start)
        else:
            name = self.take(_FILE) or ""
        span = (start, max(self.at, start + 1))
        if not name:
            raise self.fail("a file name is expected after '@'", span)
        folder = self.source.file.parent if self.source.file else Path()
        path = folder / Path(name).expanduser()
        where = self.source.caret(span)
        if path.resolve() in self.within:
            raise self.fail(f"recipe file {path} includes itself", span)
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise BadInput(
                f"recipe file {path} is not text", where=where, why=f"not UTF-8: {error.reason}"
            ) from None
        except OSError as error:
            raise BadInput(
                f"cannot read recipe file {path}", where=where, why=error.strerror or str(error)
            ) from None
        return _Parser(Source(text, path), (*self.within, path.resolve())).pipeline()
