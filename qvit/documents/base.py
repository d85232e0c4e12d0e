"""How a document is checked: kinds of values with a range each, and what is wrong with one in one sentence.

A document is a model of pydantic: every key that something reads has a type and a range, numbers are finite, texts and
lists have an end. Keys that nothing reads may be there, so that documents of other versions can be read. `checked`
turns what pydantic finds into one sentence that names file and key:

    the result runs/a/result.json: key 'accuracy' must be a number, not 'high'
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from qvit.errors import QvitError, nearest, shown
from qvit.files import read_object
from qvit.plan.spec import MOST_HEADS

T = TypeVar("T", bound=BaseModel)
MOST_CLASSES = 1 << 16  # labels are 16-bit numbers, also in stores of soft labels
_SHOWN_MISTAKES = 5
Count = Annotated[int, Field(ge=0, le=1 << 62)]
Step = Annotated[int, Field(ge=0, le=10**12)]
Number = Annotated[float, Field(ge=-1e30, le=1e30)]
Positive = Annotated[float, Field(ge=0, le=1e30)]
Percent = Annotated[float, Field(ge=0, le=100)]
Width = Annotated[int, Field(ge=1, le=32)]
Name = Annotated[str, Field(max_length=500)]
Text = Annotated[str, Field(max_length=10_000)]
Classes = Annotated[int, Field(ge=1, le=MOST_CLASSES)]
ClassNames = Annotated[list[Name], Field(max_length=MOST_CLASSES)]


class Document(BaseModel):
    """Base class: nothing is converted, numbers are finite, further keys are let be."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())

    @classmethod
    def upgraded(cls, data: dict[str, Any]) -> dict[str, Any]:
        """The content in its present form, where an earlier version wrote it otherwise."""
        return data


def read_document(cls: type[Document], path: str | Path, what: str, **options: Any) -> dict[str, Any]:
    """The checked content of a JSON file, in its present form; see `files.read_object` and `checked`."""
    data = cls.upgraded(read_object(path, what, **options))
    checked(cls, data, f"the {what} {path}")
    return data


def checked(cls: type[T], data: Mapping[str, Any], where: str) -> T:
    """Plain data as a `cls`. Raises QvitError that begins with `where`: `the result runs/a/result.json`."""
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        raise QvitError(f"{where}: {_in_short(error, cls, _of_document)}") from None


def mistakes(error: ValidationError, cls: type[BaseModel]) -> str:
    """What pydantic found in options, as one line; unknown ones with the nearest name."""
    return _in_short(error, cls, _of_options)


def _in_short(error: ValidationError, cls: type[BaseModel], say: Callable[[str, ErrorDetails, str], str]) -> str:
    found = _together(error.errors(include_url=False))
    lines = []
    for item in found[:_SHOWN_MISTAKES]:
        key = ".".join(str(part) for part in item["loc"] if part != "[key]")[:200]
        key = key.encode("utf-8", "replace").decode()  # half a character is no text, in a message neither
        close = nearest(key, cls.model_fields, 1) or f" (known: {', '.join(cls.model_fields)})"
        lines.append(say(key, item, close))
    more = len(found) - len(lines)
    return "; ".join(lines) + (f"; and {more} more" if more else "")


def _together(found: list[ErrorDetails]) -> list[ErrorDetails]:
    """Mistakes, those as one that pydantic finds for each type that a value may have: their places end in its name."""
    places: dict[tuple[int | str, ...], ErrorDetails] = {}
    for item in found:
        place = item["loc"][:-1] if item["loc"] and _TYPE.fullmatch(str(item["loc"][-1])) else item["loc"]
        if place in places:
            places[place]["msg"] += f" or {item['msg'].removeprefix('Input should be ')}"
        else:
            places[place] = {**item, "loc": place}
    return list(places.values())


def _of_options(key: str, item: ErrorDetails, close: str) -> str:
    if item["type"] == "extra_forbidden":
        return f"unknown option '{key}'{close}"
    if item["type"] == "value_error":
        return f"{key}: {item.get('ctx', {})['error']}"
    return f"{key} = {shown(item['input'])}: {item['msg'][0].lower()}{item['msg'][1:]}"


_TYPE = re.compile(r"constrained-\w+|literal\[.*\]")
_KINDS = {
    "int": "a whole number", "float": "a number", "string": "a text", "bool": "true or false",
    "list": "a list", "dict": "an object", "model": "an object", "tuple": "a list", "model_attributes": "an object",
}  # fmt: skip
_LIMITS = {
    "greater_than_equal": "at least {ge}", "less_than_equal": "at most {le}", "greater_than": "more than {gt}",
    "less_than": "less than {lt}", "string_too_long": "a text of at most {max_length} characters",
    "too_long": "of at most {max_length} entries", "too_short": "of at least {min_length} entries",
    "literal_error": "{expected}", "finite_number": "a finite number", "int_from_float": "a whole number",
    "string_pattern_mismatch": "of the form {pattern}", "string_unicode": "Unicode",
}  # fmt: skip


def _of_document(key: str, item: ErrorDetails, close: str) -> str:
    kind, about = item["type"], item.get("ctx", {})
    if kind == "missing":
        return f"key '{key}' is missing"
    if kind == "value_error":
        return f"key '{key}' {about['error']}" if key else f"it {about['error']}"
    if kind == "extra_forbidden":
        return f"key '{key}' is unknown{close}"
    must = _LIMITS[kind].format(**about) if kind in _LIMITS else _KINDS.get(kind.removesuffix("_type"), item["msg"])
    return f"key '{key}' must be {must}, not {shown(item['input'])}"


def as_list(value: Any) -> Any:
    """A value that is no list as a list of it; None stays."""
    return value if value is None or isinstance(value, list) else [value]


def as_object(value: Any) -> Any:
    """None as an empty object."""
    return {} if value is None else value


def entries(value: Any) -> Any:
    """None as an empty list."""
    return [] if value is None else value


#: One number, or one per head.
Widths = Annotated[list[Width], BeforeValidator(as_list), Field(min_length=1, max_length=MOST_HEADS)]
RealWidths = Annotated[
    list[Annotated[float, Field(ge=0, le=32)]], BeforeValidator(as_list), Field(min_length=1, max_length=MOST_HEADS)
]
