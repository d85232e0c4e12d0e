"""Recipes: TOML files with the options of a run.

A recipe is flat: keys of `TrainConfig`, and tables for the keys that are dictionaries.

    model = "deit_tiny_patch16_224"
    method = "qvit"
    budget = "4bit"
    epochs = 300

    [method_options]
    searching_ratio = 0.9

Options on the command line override it, key by key; `method_options.searching_ratio` reaches into a table, and a table
given as a whole replaces the recipe's. Paths in a recipe are relative to the working directory, as on the command
line. A recipe for images that everybody keeps somewhere else has no `data`: they must then be given, because the
default of `TrainConfig` (digits) is not what such a recipe is for.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qvit.errors import QvitError, UsageError, nearest
from qvit.files import MissingFile, read_text
from qvit.training.config import TrainConfig

SUFFIX = ".toml"
_LIMIT, _LONGEST_LINE = 1 << 16, 2000  # a key of thousands of parts takes seconds and gigabytes to parse
TABLES = ("method_options", "model_kwargs", "teacher_kwargs")


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The options that a recipe gives, as nested dictionaries.

    Raises:
        UsageError: No such file, no TOML, an unknown key or a value of the wrong type; the message names the file.
    """
    path = Path(path)
    try:
        text = read_text(path, "recipe", limit=_LIMIT)
        if max(map(len, text.split("\n"))) > _LONGEST_LINE:
            raise QvitError(f"a line has more than {_LONGEST_LINE:,} characters")
        values = tomllib.loads(text)
    except MissingFile:
        others = [str(other) for other in path.parent.glob(f"*{SUFFIX}")] if path.parent.is_dir() else []
        raise UsageError(f"no recipe at {path}{nearest(str(path), others)}") from None
    except RecursionError:
        raise UsageError(f"the recipe {path} cannot be read: it is nested too deeply") from None
    except (QvitError, ValueError) as error:  # ValueError: no TOML, or a number of thousands of digits
        raise UsageError(f"the recipe {path} cannot be read: {error}") from None
    try:
        TrainConfig.create(**values)
    except UsageError as error:
        raise UsageError(f"the recipe {path}: {error}") from None
    return values


def merged(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`base`, overridden by `overrides`.

    Of float weights there is one source: weights from a file end `pretrained`, and the other way round, unless both
    are overridden.

    Args:
        base: Options, such as those of a recipe; not changed.
        overrides: Keys as in `base`, or dotted ones (`method_options.head_wise`) for an entry of a table.

    Raises:
        UsageError: A dotted key that does not lead into a table.
    """
    values = {key: dict(value) if isinstance(value, Mapping) else value for key, value in base.items()}
    for key, value in overrides.items():
        name, _, entry = key.partition(".")
        if not entry:
            values[name] = value
            continue
        table = values.setdefault(name, {})
        if name not in TABLES or not isinstance(table, dict):
            hint = nearest(name, TABLES) or f"; there are {', '.join(TABLES)}"
            raise UsageError(f"'{key}': '{name}' is no table{hint}")
        table[entry] = value
    if overrides.get("weights") and "pretrained" not in overrides:
        values["pretrained"] = False
    if overrides.get("pretrained") and "weights" not in overrides:
        values["weights"] = None
    return values


def config_from_recipe(
    path: str | Path, overrides: Mapping[str, Any] | None = None, *, needs_data: bool = True
) -> TrainConfig:
    """The config of a recipe with overrides.

    Args:
        path: The TOML file.
        overrides: See `merged`.
        needs_data: Refuse a recipe that names no data where the overrides name none either.

    Raises:
        UsageError: See `read_recipe`; or there are no data, or an override is wrong.
    """
    values = merged(read_recipe(path), overrides or {})
    if needs_data and not values.get("data"):
        raise UsageError(f"this recipe has no data: give --data ({path} is for images that are not part of it)")
    return TrainConfig.create(**values)
