"""Writes the tables of options in docs/cli.md from the fields of configs, and the recipes' JSON schema from them.

    python docs/options.py            writes
    python docs/options.py --check    writes nothing; exit code 1 if a file is not what this writes

A table stands between `<!-- options:NAME:begin -->` and `<!-- options:NAME:end -->`. NAME is `settings` (of
`qvit train`), a method (its options), or `command NAME`.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo
from typer.models import ArgumentInfo, ParameterInfo

import qvit.cli  # noqa: F401  # registers the commands
import qvit.methods.ptq.method  # noqa: F401  # registers `ptq`
from qvit.cli.options import COMMANDS, Fields, types_of
from qvit.methods import METHODS
from qvit.training.config import TrainConfig
from qvit.training.oscillation import RemedyOptions

ROOT = Path(__file__).resolve().parents[1]
PAGE, SCHEMA = ROOT / "docs" / "cli.md", ROOT / "recipes" / "schema.json"
_BLOCK = re.compile(r"<!-- options:([^:]+):begin -->\n.*?<!-- options:\1:end -->", re.DOTALL)
#: Sections that leave out the fields of a base class, which another table has.
_WITHOUT = {"ofq": RemedyOptions}
_FAR = 10**6  # a limit that large keeps strangers' files in bounds and says nothing to a reader
_LIMITS = {"ge": "≥ {}", "gt": "> {}", "le": "≤ {}", "lt": "< {}"}


def page(text: str) -> str:
    """The page with every table written anew."""
    return _BLOCK.sub(lambda m: f"<!-- options:{m[1]}:begin -->\n\n{_table(m[1])}\n\n<!-- options:{m[1]}:end -->", text)


def _table(name: str) -> str:
    if name.startswith("command "):
        return _rows(("option", "default", "meaning"), _of_command(name.removeprefix("command ")))
    cls: Any = TrainConfig if name == "settings" else METHODS[name].Options
    left_out = _WITHOUT[name].model_fields if name in _WITHOUT else ()
    fields = {key: field for key, field in cls.model_fields.items() if key not in left_out}
    rows = ((f"`{key}`", _default(field), _values(field), field.description or "") for key, field in fields.items())
    return _rows(("key", "default", "values", "meaning"), rows)


def _rows(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _of_command(name: str) -> Iterator[tuple[str, str, str]]:
    """Option, default and meaning of each option of a command."""
    for key, parameter in inspect.signature(inspect.unwrap(COMMANDS[name].call), eval_str=True).parameters.items():
        for own in get_args(parameter.annotation)[1:]:
            if isinstance(own, Fields):
                for field, made in own.parameters():
                    info = own.fields[field]
                    default = json.dumps(own.defaults[field]) if field in own.defaults else _default(info)
                    yield _flags(field, made.default), _code(default), own.help.get(field) or info.description or ""
            elif isinstance(own, ParameterInfo) and key not in ("as_json", "quiet"):
                default = "" if parameter.default is inspect.Parameter.empty else json.dumps(parameter.default)
                meaning = (own.help or "").rstrip(".")
                yield _flags(key, own), _code(default), meaning[:1].lower() + meaning[1:]


def _code(default: str) -> str:
    """A default as text; none where it says nothing."""
    shown = default.strip('`"')
    return "" if shown in ("", "null", "{}", "false") else f"`{shown}`"


def _flags(name: str, info: ParameterInfo) -> str:
    if isinstance(info, ArgumentInfo):
        return f"`{(info.metavar or name).upper()}`"
    declared = [info.default, *(info.param_decls or ())] if isinstance(info.default, str) else info.param_decls or ()
    flags = [flag for each in declared for flag in str(each).split("/") if flag.startswith("-")]
    metavar = f" {info.metavar}" if info.metavar == "KEY=VALUE" else ""
    return ", ".join(f"`{flag}{metavar}`" for flag in flags or [f"--{name.replace('_', '-')}"])


def _default(field: FieldInfo) -> str:
    return "" if field.is_required() else f"`{json.dumps(field.get_default(call_default_factory=True))}`"


def _values(field: FieldInfo) -> str:
    """Words or limits that a field allows."""
    kinds = types_of(field.annotation)
    words = [f"`{word}`" for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
    if words:
        return ", ".join(words)
    if bool in kinds:
        return "`true`, `false`"
    limits = [*field.metadata, *(part for kind in get_args(field.annotation) for part in _metadata(kind))]
    found = {key: getattr(part, key) for part in limits for key in _LIMITS if hasattr(part, key)}
    near = [text.format(f"{found[key]:g}") for key, text in _LIMITS.items() if key in found and found[key] < _FAR]
    return ", ".join(near)


def _metadata(kind: Any) -> Iterable[Any]:
    return (part for own in get_args(kind)[1:] if isinstance(own, FieldInfo) for part in own.metadata)


def schema() -> str:
    """The JSON schema of a recipe: every setting, and the options of every method."""
    content = TrainConfig.model_json_schema()
    classes = (METHODS[name].Options for name in sorted(METHODS))
    options: dict[str, Any] = {cls.__name__: cls.model_json_schema() for cls in classes}
    content["required"] = []
    content["properties"]["method"]["enum"] = sorted(METHODS)
    content["properties"]["method_options"]["anyOf"] = [{"$ref": f"#/$defs/{name}"} for name in options]
    content["$defs"] = content.get("$defs", {}) | options
    return json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", **content}, indent=1) + "\n"


def main() -> int:
    """Writes the files, or says which are others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a file is out of date")
    check = parser.parse_args().check
    texts = {PAGE: page(PAGE.read_text(encoding="utf-8")), SCHEMA: schema()}
    stale = [path for path, text in texts.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        if check:
            sys.stderr.write(f"out of date: {path.name}\n")
        else:
            path.write_text(texts[path], encoding="utf-8")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
