"""Reports as JSON: encode, decode with checks, and the JSON schema, all read off the dataclasses.

JSON has no infinity (the tolerance of an APPROXIMATE claim): such numbers are the texts ``"inf"``,
``"-inf"`` and ``"nan"``.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import types
import typing
from pathlib import Path
from typing import Any, Literal, Union

from sparsify.errors import BadInput
from sparsify.report import FORMAT, FORMAT_VERSION, Report

SCHEMA_FILE = Path(__file__).with_name("report.schema.json")
_SPECIAL = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


def encode(value: Any) -> Any:
    """Plain JSON values of a dataclass, tuple, dict or number."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): encode(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [encode(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def parse(text: str) -> Any:
    """JSON values of ``text``, or BadInput with the line."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise BadInput("the report is not JSON", why=str(error)) from None


def report_from(value: Any) -> Report:
    """The report in JSON values; raises BadInput that names the field."""
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise BadInput("this JSON is not a sparsify report", help="compile --json writes one")
    if value.get("format_version") != FORMAT_VERSION:
        raise BadInput(
            f"the report has format version {value.get('format_version')!r}",
            why=f"this sparsify reads version {FORMAT_VERSION}",
            help="use the sparsify that wrote it, or compile again",
        )
    body = {k: v for k, v in value.items() if k not in ("format", "format_version")}
    report: Report = _decode(Report, body, "report")
    return report


@functools.cache
def _fields(cls: type) -> dict[str, tuple[Any, bool]]:
    """field name -> (type, whether it has to be given)."""
    hints = typing.get_type_hints(cls)
    return {
        f.name: (
            hints[f.name],
            f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING,
        )
        for f in dataclasses.fields(cls)
    }


def _decode(kind: Any, value: Any, at: str) -> Any:
    """``value`` as ``kind``, or BadInput naming the place ``at``."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        inner = next(a for a in args if a is not type(None))
        return None if value is None else _decode(inner, value, at)
    if origin is Literal and value in args:
        return value
    if origin is tuple and isinstance(value, list):
        return tuple(_decode(args[0], v, f"{at}[{i}]") for i, v in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {k: _decode(args[1], v, f"{at}.{k}") for k, v in value.items()}
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        fields = _fields(typing.cast("type", kind))
        unknown = [k for k in value if k not in fields]
        missing = [k for k, (_, required) in fields.items() if required and k not in value]
        if unknown or missing:
            what = f"has no field '{missing[0]}'" if missing else f"has a field '{unknown[0]}'"
            raise BadInput(f"the report is malformed: {at} {what}", help="compile again")
        built = {k: _decode(fields[k][0], v, f"{at}.{k}") for k, v in value.items()}
        return typing.cast("type", kind)(**built)
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if kind is float and value in _SPECIAL:
        return _SPECIAL[value]
    if type(value) is kind:
        return value
    raise BadInput(f"the report is malformed: {at} is {value!r}", help="compile again")


# ---------------------------------------------------------------------------- schema


def schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a report; ``report.schema.json`` holds it."""
    definitions: dict[str, Any] = {}
    body = _schema_of_class(Report, definitions)
    body["properties"] = {
        "format": {"const": FORMAT},
        "format_version": {"const": FORMAT_VERSION},
        **body["properties"],
    }
    body["required"] = ["format", "format_version", *body["required"]]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "sparsify report",
        **body,
        "$defs": dict(sorted(definitions.items())),
    }


def _schema_of_class(cls: type, definitions: dict[str, Any]) -> dict[str, Any]:
    fields = _fields(cls)
    return {
        "description": (cls.__doc__ or "").strip().splitlines()[0],
        "type": "object",
        "properties": {name: _schema(kind, definitions) for name, (kind, _) in fields.items()},
        "required": [name for name, (_, required) in fields.items() if required],
        "additionalProperties": False,
    }


_PLAIN: dict[Any, dict[str, Any]] = {
    str: {"type": "string"},
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    float: {"anyOf": [{"type": "number"}, {"enum": list(_SPECIAL)}]},
    Any: {},
}


def _schema(kind: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind in _PLAIN:
        return dict(_PLAIN[kind])
    if origin in (Union, types.UnionType):
        inner = next(a for a in args if a is not type(None))
        return {"anyOf": [_schema(inner, definitions), {"type": "null"}]}
    if origin is Literal:
        return {"enum": list(args)}
    if origin is tuple:
        return {"type": "array", "items": _schema(args[0], definitions)}
    if origin is dict:
        return {"type": "object", "additionalProperties": _schema(args[1], definitions)}
    if kind.__name__ not in definitions:
        definitions[kind.__name__] = {}  # stands in while the class refers to itself
        definitions[kind.__name__] = _schema_of_class(kind, definitions)
    return {"$ref": f"#/$defs/{kind.__name__}"}
